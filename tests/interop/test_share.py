"""Sharing on a hub: what is pushed comes back the same, cards say what it is, and refusals say what to do."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import command_line
import commandv as cv
import foreign
import local_hub
import tiny
from command_line import fails
from commandv.errors import FormatError, HubError, InputError, StorageError
from commandv.interop.cards import card_of
from commandv.models.identity import ModelRef
from foreign import Reft, key, write_pyreft
from places import ROOT

hub, run, seed = local_hub.hub, command_line.run, foreign.seed


@pytest.fixture
def adapter(lm):
    provenance = {"made_by": "train", "settings": {"seed": 0}}
    return replace(tiny.random_adapter(lm, layers=(1, 3)), name="lists", provenance=provenance)


@pytest.fixture
def profile(lm):
    return cv.profile(lm, ["How are you?", "What is tea?", "Name a river."], text=None)


@pytest.fixture
def demonstrations():
    return cv.Demonstrations(("How are you?",), ("Fine, thank you.",), ModelRef(id="maker/donor"), "manners")


def upload(hub, name: str, folder: Path, kind: str = "model", **how) -> local_hub.Repo:
    repo = hub.repo(name, kind, **how)
    repo.commit({one.name: one.read_bytes() for one in folder.iterdir()})
    return repo


def same(one: cv.Adapter, other: cv.Adapter) -> bool:
    h = torch.randn(3, one.d_model)
    return one.layers == other.layers and all(
        torch.equal(foreign.delta(one, layer, h), foreign.delta(other, layer, h)) for layer in one.layers
    )


def head(repo: local_hub.Repo) -> dict:
    return yaml.safe_load(repo.files()["README.md"].decode().split("---\n")[1])


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


# -- cards ------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_from_what_and_how_it_was_made(hub, adapter):
    hub.repo("maker/base").commit({"README.md": b"---\nlicense: gemma\n---\n"})
    donor = {"id": "maker/donor", "d_model": 3}
    pasted = replace(
        adapter,
        model=replace(adapter.model, id="maker/base"),
        provenance={"made_by": "paste", "donor": donor, "link": {"fit": {"kind": "ridge"}}},
    )
    cv.push(pasted, "anna/pasted", license="apache-2.0")
    repo = hub.repos["model", "anna/pasted"]
    assert head(repo) == {
        "base_model": "maker/base",
        "base_model_relation": "adapter",
        "library_name": "commandv",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["commandv", "activation-steering", "representation-engineering", "pasted"],
    }
    text = repo.files()["README.md"].decode()
    for part in ("# `lists`", "`maker/donor`", "(licence `gemma`)", "| `link.fit.kind` | `ridge` |", "`apache-2.0`"):
        assert part in text
    assert 'cv.load_adapter("anna/pasted")' in text


def test_packaged_models_have_their_names_on_the_hub(lm):
    one = tiny.random_adapter(replace(lm, id="smollm2-135m-instruct"))
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card_of(one, "anna/x")


def test_a_directory_is_no_base_model(lm):
    text = card_of(tiny.random_adapter(replace(lm, id="/home/anna/models/x")), "anna/x")
    assert "base_model" not in text.split("---\n")[1]


def certificate(**changes) -> dict:
    def arm(value: float) -> dict:
        figure = {"name": "x", "value": value, "low": value - 0.1, "high": value + 0.1, "n": 64, "unit": "rate"}
        price = {"kl_first": {**figure, "value": 3.25}, "kl_after": {**figure, "value": 0.5}}
        return {"score": figure, "loops": {**figure, "value": 0.0}, "price": price, "tokens_per_request": 0}

    return {
        "verdict": "crosses",
        "sentence": "lists cross: 0.36 [0.26, 0.46] of 64 answers, 0.00 unmodified.",
        "by": "paste",
        "arm": "pasted",
        "arms": {"unmodified": arm(0.0), "pasted": arm(0.36), "random": arm(0.02)},
        "task": {"name": "numbered-list", "unit": "rate", "success": "more", "n_test": 64, "judge": "lists"},
        "command": "commandv transfer a b c -o d",
        **changes,
    }


def test_a_certificate_is_told_with_its_controls_and_the_command(adapter):
    text = card_of(replace(adapter, provenance={"made_by": "paste", "certificate": certificate()}), "anna/x")
    front = yaml.safe_load(text.split("---\n")[1])
    (index,) = front["model-index"]
    assert index["results"][0]["metrics"][0]["value"] == 0.36
    assert index["results"][0]["dataset"]["name"] == "numbered-list"
    assert r"lists cross\: 0\.36 \[0\.26\, 0\.46\] of 64 answers\, 0\.00 unmodified\." in text
    assert "| `pasted` (this adapter, by `paste`) | 0.36 [0.26, 0.46] | 0.00 " in text
    assert "| `random` | 0.02 " in text
    assert "`commandv transfer a b c -o d`" in text
    assert "`certificate." not in text


def test_a_certificate_of_another_form_is_told_as_it_stands(adapter):
    text = card_of(replace(adapter, provenance={"certificate": {"verdict": "crosses", "rate": 0.5}}), "anna/x")
    assert "| `verdict` | `crosses` |" in text
    assert "model-index" not in text
    assert "Nothing that this card knows of" in card_of(adapter, "anna/x")


HOSTILE = (
    '"""\n```\n---\nlicense: mit\n---\n# <script>alert(1)</script> ![x](http://evil/x.png) | `a` ``b`` {{ 7 * 7 }}'
)


def test_what_strangers_wrote_means_nothing_in_a_card(adapter):
    one = replace(
        adapter,
        name=HOSTILE,
        provenance={
            HOSTILE: HOSTILE,
            "donor": {"id": HOSTILE},
            "certificate": certificate(
                verdict=HOSTILE,
                sentence=HOSTILE,
                by=HOSTILE,
                command=HOSTILE,
                arms={HOSTILE: certificate()["arms"]["pasted"], "pasted": certificate()["arms"]["pasted"]},
                task={"name": HOSTILE, "unit": HOSTILE, "success": HOSTILE, "n_test": 64},
            ),
        },
        model=replace(adapter.model, id=HOSTILE, revision=HOSTILE),
    )
    text = card_of(one, "anna/x", license="mit", licenses={HOSTILE: HOSTILE})
    _, front, body = text.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"library_name", "license", "model-index", "pipeline_tag", "tags"}
    outside = re.sub(r"^```python\n.*?^```$", "", body, flags=re.S | re.M)
    assert '"""' not in body.split("```python")[1].split("\n```")[0]
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)  # code spans
    for word in ("<", "evil", "![", "49", "alert", "`"):
        assert word not in outside, outside
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} <= {3, 7}, "a bar in a value does not end its cell"


# -- refusals ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(InputError, match="a dict: expected an adapter"):
        cv.push({}, "anna/x")
    with pytest.raises(FormatError, match="no such file"):
        cv.push(tmp_path / "nothing", "anna/x")
    with pytest.raises(InputError, match="expected the hub's name of one"):
        cv.push(tmp_path, "anna/x", license="Do what you like\nbase_model: x")
    assert hub.repos == {}


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
