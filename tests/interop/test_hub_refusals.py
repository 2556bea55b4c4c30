"""What a hub refuses, breaks off or holds beside ours is told, and nothing of it is run."""

from __future__ import annotations

import os
import time

import pytest
import torch

import command_line
import commandv as cv
import foreign
import local_hub
import sharing
from commandv.errors import FormatError, HubError, InputError, StorageError
from foreign import Reft, key, write_pyreft
from sharing import same, upload

adapter, profile = sharing.adapter, sharing.profile


hub, run, seed = local_hub.hub, command_line.run, foreign.seed


def test_not_logged_in(hub, adapter, monkeypatch):
    hub.repo("anna/private", private=True).commit({})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for call in (lambda: cv.load_adapter("anna/private"), lambda: cv.push(adapter, "anna/new")):
        with pytest.raises(HubError, match="hf auth login"):
            call()
    assert ("model", "anna/new") not in hub.repos


def test_a_name_that_is_not_there(hub):
    for load in (cv.load_adapter, cv.load_profile, cv.load_demonstrations):
        with pytest.raises(HubError, match="anna/nothing is not there, or is private: check the name"):
            load("anna/nothing")


def test_a_gated_repository(hub, adapter, tmp_path):
    upload(hub, "anna/gated", cv.save(adapter, tmp_path / "a"), gated=True)
    with pytest.raises(HubError, match=f"is gated: ask for access at {hub.url}/anna/gated"):
        cv.load_adapter("anna/gated")


def test_too_many_requests(hub):
    hub.wrong["GET", "anna/busy"] = (429, {}, {"Retry-After": "17"})
    with pytest.raises(HubError, match="run the same again after 17 seconds"):
        cv.load_adapter("anna/busy")


def test_a_hub_that_asks_to_wait_while_a_file_is_fetched_is_waited_for(hub, adapter, tmp_path, monkeypatch):
    upload(hub, "anna/lists", cv.save(adapter, tmp_path / "a"))
    waited = []
    monkeypatch.setattr(time, "sleep", lambda seconds: (waited.append(seconds), hub.wrong.clear()))
    hub.wrong["GET", "resolve.*tensors"] = (429, {}, {"Retry-After": "3"})
    assert same(cv.load_adapter("anna/lists"), adapter)
    assert 4.0 in waited


def test_half_a_file_is_told_or_fetched_again_and_never_read(hub, adapter, tmp_path, monkeypatch):
    upload(hub, "anna/lists", cv.save(adapter, tmp_path / "a"))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.times["half"] = 1000
    with pytest.raises(HubError, match="incomplete"):
        cv.load_adapter("anna/lists")
    hub.times["half"] = 0
    assert same(cv.load_adapter("anna/lists"), adapter)


def test_a_file_that_is_not_what_the_hub_says_is_fetched_again(hub, adapter, tmp_path):
    upload(hub, "anna/lists", cv.save(adapter, tmp_path / "a"))
    hub.times["other"] = 2
    assert same(cv.load_adapter("anna/lists"), adapter)
    hub.times["other"] = 0
    assert same(cv.load_adapter("anna/lists"), adapter)


def test_offline_what_was_fetched_is_there_and_nothing_else(hub, adapter, tmp_path, monkeypatch):
    upload(hub, "anna/lists", cv.save(adapter, tmp_path / "a"))
    cv.load_adapter("anna/lists")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert same(cv.load_adapter("anna/lists"), adapter)
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
        cv.load_adapter("anna/other")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        cv.push(adapter, "anna/more")
    assert len(hub.asked) == asked


def test_a_hub_that_is_out_of_order(hub, adapter, tmp_path):
    upload(hub, "anna/lists", cv.save(adapter, tmp_path / "a"))
    cv.load_adapter("anna/lists")
    hub.wrong["GET", "/api/"] = (503, {}, {})
    assert same(cv.load_adapter("anna/lists"), adapter)
    with pytest.raises(HubError, match="503"):
        cv.load_adapter("anna/other")


def test_an_endpoint_that_is_no_hub(hub):
    hub.wrong["GET", "/api/models"] = (200, "hello", {})
    with pytest.raises(HubError, match="check HF_ENDPOINT"):
        cv.load_adapter("anna/lists")


class _Bomb:
    def __reduce__(self):
        return os.mkdir, (str(_Bomb.path),)


def test_pickles_are_refused_and_never_run(hub, tmp_path):
    _Bomb.path = tmp_path / "exploded"
    torch.save(_Bomb(), tmp_path / "bomb.pt")
    bomb = (tmp_path / "bomb.pt").read_bytes()
    folder = write_pyreft(tmp_path / "a", {key(2): Reft("DiReFT")}, positions="l1")
    foreign.weights(folder).write_bytes(bomb)
    upload(hub, "eve/reft", folder)
    hub.repo("eve/vector").commit({"vector.pt": bomb})
    hub.repo("eve/pickle").commit({"README.md": b"x", "adapter.pkl": bomb})
    for name, message in (("reft", "could run code"), ("vector", "could run code"), ("pickle", "was not fetched")):
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(f"eve/{name}", layer=1)
    assert not _Bomb.path.exists()
    assert not [one for one in hub.asked if "adapter.pkl" in one]


def test_repositories_that_hold_something_else(hub, adapter, profile):
    hub.repo("bob/model").commit({"config.json": b"{}", "model.safetensors": b"x"})
    hub.repo("bob/words").commit({"README.md": b"# no metadata of ours\n"})
    with pytest.raises(FormatError, match="a model, not an adapter; load_model"):
        cv.load_adapter("bob/model")
    with pytest.raises(FormatError, match=r"nothing that can be loaded.*README\.md"):
        cv.load_adapter("bob/words")
    cv.push(profile, "anna/profile")
    with pytest.raises(FormatError, match="expected a commandv-demonstrations"):
        cv.load_demonstrations("anna/profile")
    assert not [one for one in hub.asked if "bob/model/resolve" in one]
    for name in ("bob/model", "bob/words"):
        before = dict(hub.repos["model", name].commits)
        if name == "bob/model":
            hub.repos["model", name].private = True
            with pytest.raises(FormatError, match=r"no part of a commandv-adapter \(model\.safetensors"):
                cv.push(adapter, name)
        else:
            with pytest.raises(HubError, match=r"is public, and nothing was uploaded.*--public"):
                cv.push(adapter, name)
        assert hub.repos["model", name].commits == before


def test_an_upload_that_breaks_off_commits_nothing(hub, adapter):
    hub.wrong["PUT", "/lfs/"] = (400, {}, {})
    with pytest.raises(HubError, match="broke off, and nothing was committed"):
        cv.push(adapter, "anna/lists")
    assert list(hub.repos["model", "anna/lists"].files()) == [".gitattributes"]
    hub.wrong.clear()
    cv.push(adapter, "anna/lists")
    assert same(cv.load_adapter("anna/lists"), adapter)


@pytest.mark.parametrize("name", ["anna", "anna/", "a/b/c", "anna/../x", "-x/y"])
def test_names_that_are_no_repositories(name, hub, adapter, tmp_path):
    with pytest.raises(InputError, match="expected the hub's user/name"):
        cv.push(adapter, name)
    with pytest.raises(InputError, match="expected the hub's user/name"):
        cv.pull(name, tmp_path / "x")
    assert hub.asked == []


def test_pulling_does_not_destroy(hub, adapter, tmp_path):
    cv.push(adapter, "anna/lists")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"notes\.txt"):
        cv.pull("anna/lists", tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises((FormatError, StorageError)):
        cv.pull("anna/lists", tmp_path / "file")


def test_what_is_no_artefact(hub, tmp_path):
    with pytest.raises(InputError, match="artefact is a dict, expected Adapter or Profile or Demonstrations"):
        cv.push({}, "anna/x")
    with pytest.raises(FormatError, match="no such file"):
        cv.push(tmp_path / "nothing", "anna/x")
    with pytest.raises(InputError, match="expected the hub's name of one"):
        cv.push(tmp_path, "anna/x", license="Do what you like\nbase_model: x")
    assert hub.repos == {}
