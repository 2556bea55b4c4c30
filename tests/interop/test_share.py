"""Sharing on a hub: what is pushed comes back the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import command_line
import commandv as cv
import foreign
import local_hub
import sharing
import tiny
from command_line import fails
from commandv.errors import HubError, InputError
from commandv.models.identity import ModelRef
from foreign import Reft, key, write_pyreft
from places import ROOT
from sharing import head, same, upload

adapter, profile = sharing.adapter, sharing.profile


hub, run, seed = local_hub.hub, command_line.run, foreign.seed


@pytest.fixture
def demonstrations():
    return cv.Demonstrations(("How are you?",), ("Fine, thank you.",), ModelRef(id="maker/donor"), "manners")


# -- there and back ---------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back_as_it_was(hub, adapter):
    pushed = cv.push(adapter, "anna/lists", license="mit")
    repo = hub.repos["model", "anna/lists"]
    assert pushed.url == f"{hub.url}/anna/lists"
    assert pushed.commit == repo.refs["main"]
    assert pushed.size == sum(len(data) for name, data in repo.files().items() if name != ".gitattributes")
    assert repo.private
    assert len(repo.commits) == 2, "making the repository, and one commit"
    again = cv.load_adapter("anna/lists")
    assert same(again, adapter)
    assert (again.model, again.name, again.provenance) == (adapter.model, "lists", adapter.provenance)


def test_a_profile_and_demonstrations_are_data_sets(hub, lm, profile, demonstrations):
    cv.push(profile, "anna/profile")
    cv.push(demonstrations, "anna/manners", private=False)
    assert [(kind, one.private) for (kind, _), one in hub.repos.items()] == [("dataset", True), ("dataset", False)]
    again = cv.load_profile("anna/profile")
    assert (again.keys == profile.keys).all()
    assert all(torch.equal(again.layer(layer), profile.layer(layer)) for layer in range(lm.n_layers))
    assert again.model == profile.model
    assert cv.load_demonstrations("anna/manners").answers == demonstrations.answers
    # With nothing but what was shared, and a model of one's own:
    other = tiny.tiny_lm(seed=1)
    recipient = cv.profile(other, ["How are you?", "What is tea?", "Name a river."], text=None)
    link = cv.link(again, recipient, write_rows="end", holdout=0.0)
    assert link.paste(tiny.random_adapter(lm), layers="all_layers").d_model == other.d_model


@pytest.mark.parametrize("what", ["adapter", "profile", "demonstrations"])
def test_pulled_directories_are_whole(what, hub, request, tmp_path):
    one = request.getfixturevalue(what)
    cv.push(one, "anna/it")
    cv.pull("anna/it", tmp_path / "it")
    hub.repos.clear()
    load = {"adapter": cv.load_adapter, "profile": cv.load_profile, "demonstrations": cv.load_demonstrations}[what]
    assert type(load(tmp_path / "it")) is type(one)
    if what == "profile":  # and how the rows were made
        config = json.loads((tmp_path / "it" / "config.json").read_text())
        assert config["dtype"] == "float32"


def test_pushing_again_replaces_and_the_earlier_version_stays_at_its_revision(hub, adapter):
    first = cv.push(adapter, "anna/lists")
    hub.repos["model", "anna/lists"].refs["v1"] = first.commit
    cv.push(adapter.scaled(2.0), "anna/lists")
    files = hub.repos["model", "anna/lists"].files()
    assert sorted(re.sub("-[0-9a-f]{12}", "", name) for name in files) == [
        ".gitattributes", "README.md", "config.json", "tensors.safetensors"
    ]  # fmt: skip
    assert same(cv.load_adapter("anna/lists"), adapter.scaled(2.0))
    for revision in ("v1", first.commit):
        assert same(cv.load_adapter("anna/lists", revision=revision), adapter)
    with pytest.raises(HubError, match="no such revision"):
        cv.load_adapter("anna/lists", revision="v9")


def test_foreign_adapters_are_pushed_as_ours_and_never_as_pickles(hub, tmp_path):
    path = write_pyreft(tmp_path / "a", {key(2): Reft("DiReFT")}, model_name="maker/base", positions="l1")
    cv.push(path, "anna/imported")
    repo = hub.repos["model", "anna/imported"]
    assert not [name for name in repo.files() if name.endswith(".bin")]
    assert same(cv.load_adapter("anna/imported"), cv.load_adapter(path))
    assert head(repo)["base_model"] == "maker/base"


def test_a_pyreft_repository_and_one_with_a_vector_are_read(hub, tmp_path):
    module = Reft("DiReFT")
    upload(hub, "bob/reft", write_pyreft(tmp_path / "a", {key(2): module}, positions="l1"))
    adapter = cv.load_adapter("bob/reft")
    assert (adapter.layers, adapter.name) == ([2], "reft")
    vector = torch.randn(8)
    hub.repo("bob/vector").commit({"README.md": b"a vector", "happy.safetensors": _vector(vector)})
    assert torch.allclose(foreign.delta(cv.load_adapter("bob/vector", layer=3), 3, torch.zeros(8)), vector)


def _vector(vector: torch.Tensor) -> bytes:
    from safetensors.torch import save

    return save({"vector": vector})


def test_what_is_on_this_disk_comes_first(hub, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv.save(adapter, Path("anna/lists"))
    assert same(cv.load_adapter("anna/lists"), adapter)
    assert hub.asked == []
    with pytest.raises(InputError, match="revision='v1' is for repositories"):
        cv.load_adapter("anna/lists", revision="v1")


# -- the command line -------------------------------------------------------------------------------------------------


def test_verbs(run, hub, adapter, profile, tmp_path):
    cv.save(adapter, tmp_path / "a")
    ran = run("push", tmp_path / "a", "anna/lists", "--license", "mit", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["url"] == f"{hub.url}/anna/lists"
    assert ran.json["private"] is True
    assert run("pull", "anna/lists", "-o", tmp_path / "b").code == 0
    assert same(cv.load_adapter(tmp_path / "b"), adapter)
    assert run("push", tmp_path / "a", "anna/open", "--public").code == 0
    assert not hub.repos["model", "anna/open"].private
    cv.push(profile, "anna/profile")
    assert run("pull", "anna/profile", "--out", tmp_path / "p", "--json").json["what"] == "commandv-profile"
    fails(run("pull", "anna/nothing", "-o", tmp_path / "c"), "anna/nothing is not there")


@pytest.mark.parametrize("what", ["adapter", "profile", "demonstrations"])
def test_inspect_tells_of_a_repository_what_it_tells_of_the_directory(what, run, hub, request, tmp_path):
    cv.push(request.getfixturevalue(what), "anna/thing")
    assert run("pull", "anna/thing", "-o", tmp_path / "thing").code == 0
    there, here = run("inspect", "anna/thing", "--json"), run("inspect", tmp_path / "thing", "--json")
    assert there.code == 0, there.err
    assert there.json == here.json
    assert there.json["what"] == f"commandv-{what}"


def test_inspect_of_a_repository_that_is_not_there_or_holds_nothing_of_ours(run, hub):
    hub.repo("anna/notes").commit({"notes.txt": b"x"})
    fails(run("inspect", "anna/nothing"), "anna/nothing is not there")
    fails(run("inspect", "anna/notes"), "nothing that can be loaded", "notes.txt")


def test_the_page_on_sharing_runs(hub, adapter, monkeypatch, tmp_path):
    """Tiny models and few prompts stand in for the page's."""
    models = {"gemma-3-270m": tiny.tiny_lm(seed=1), "smollm2": tiny.tiny_lm()}
    load_prompts, paste = cv.load_prompts, cv.paste
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv, "load_model", lambda name: models[name])
    monkeypatch.setattr(cv, "load_prompts", lambda source: load_prompts(source, limit=24))
    monkeypatch.setattr(cv, "paste", lambda *given: paste(*given, layers="all_layers"))
    donor = models["smollm2"]
    prompts, text = cv.load_prompts("builtin:general"), cv.load_prompts("builtin:text")
    cv.push(cv.profile(donor, prompts, text=text), "anna/smollm2-135m-profile")
    cv.save(adapter, "my-adapter")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "share.md").read_text("utf-8"), re.S):
        exec(block, names)
    card = hub.repos["dataset", "anna/smollm2-135m-profile"].files()["README.md"].decode()
    for one in (prompts, text):
        assert f"| `{one.name}` | {len(one)} | `{one.hash}` |" in card
    assert 'cv.load_prompts("builtin:general")' in card
    assert names["pasted"].model == models["gemma-3-270m"].ref
    assert same(names["adapter"], names["same"])
