"""From an adapter of one model to a measured one of its twin: the behaviour arrives, and its controls do not."""

from __future__ import annotations

import dataclasses
import re

import pytest

import commandv as cv
import tiny
import twin
from commandv.errors import InputError, MismatchError
from commandv.evaluation.arms import ARMS, METHODS, methods
from commandv.evaluation.catalogue import expecting
from commandv.evaluation.tasks import Task
from commandv.evaluation.transferring import job as job_module, running
from commandv.evaluation.transferring.job import prepare
from commandv.evaluation.transferring.planning import plan
from commandv.prompts.sets import Prompt, PromptSet
from places import ROOT

PROMPTS = PromptSet(tuple(Prompt(f"What is {n} and {m}?") for n in range(8) for m in range(8)), "sums")
WORDS = ("river", "fox", "tea", "door", "tree", "yes", "cat", "letter", "garden", "water", "city", "quick")
PASSAGES = PromptSet(
    tuple(
        Prompt(f"Say {n}", "\n".join(f"{WORDS[(n + i) % 12]} {WORDS[(5 * n + i * i) % 12]} {n + i}" for i in range(6)))
        for n in range(40)
    ),
    "passages",
)
WORD = "th"  # one token of the tiny vocabulary
SETTINGS = cv.TransferSettings(
    by="activations", layers=("last_third",), scales=(0.5, 1.0), budget=None, most_loops=None, n_dev=8, n_test=24,
    n_asked=12, prompts=PROMPTS, text=PASSAGES, passages=PASSAGES[:4], asked=PROMPTS[:16],
)  # fmt: skip


def task(word: str = WORD, **changes) -> Task:
    asked = {"dev": PROMPTS[:16], "test": PROMPTS[16:], "max_new_tokens": 3}
    return dataclasses.replace(expecting(f"^{word}"), **{**asked, **changes})


@pytest.fixture(scope="module")
def pair():
    donor = tiny.tiny_lm(seed=3, id="donor", template="plain")
    return donor, twin.twin_of(donor, noise=0.02)


@pytest.fixture(scope="module")
def behaviour(pair):
    token = pair[0].tokenizer.encode(WORD, add_special_tokens=False)
    assert len(token) == 1
    return twin.saying(pair[0], token[0])


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr("commandv.evaluation.material.ANSWER_TOKENS", 4)
    monkeypatch.setattr("commandv.transfer.distil.demonstrate.loops", lambda text: False)


@pytest.fixture
def carried(pair, behaviour, cache, brief):
    donor, recipient = pair
    return cv.transfer_adapter(donor, behaviour, recipient, task(), SETTINGS)


def rate(found, arm: str) -> float:
    return found.certificate["arms"][arm]["score"]["value"]


def test_a_pasted_behaviour_arrives_and_its_controls_do_not(carried, pair):
    assert carried.arrived
    assert carried.verdict.word == "crosses"
    assert rate(carried, carried.certificate["arm"]) >= 0.9
    for control in ("unmodified", "random-in-span", "shuffled"):
        assert rate(carried, control) <= 0.1, control
    with cv.attach(pair[1], carried.adapter):
        answers = cv.generate(pair[1], PROMPTS.texts[-5:], max_new_tokens=3)
    assert all(answer.startswith(WORD) for answer in answers)


def test_what_was_found_goes_with_the_adapter(carried, tmp_path):
    cv.save(carried.adapter, tmp_path / "it")
    kept = cv.load_adapter(tmp_path / "it").provenance["certificate"]
    assert kept["verdict"] == "crosses"
    assert kept["by"] == "activations"
    assert kept["task"]["success"] == "more"
    for arm in ("unmodified", "pasted", "random-in-span", "shuffled", "few-shot", "donor"):
        score = kept["arms"][arm]["score"]
        assert score["low"] <= score["value"] <= score["high"]
        assert score["n"] == SETTINGS.n_test
    assert kept["arms"]["pasted"]["price"]["kl"]["value"] > 0
    assert kept["arms"]["few-shot"]["tokens_per_request"] > 0
    assert kept["arms"]["pasted"]["tokens_per_request"] == 0
    assert {one["scale"] for one in kept["tried"]["activations"]} == set(SETTINGS.scales)


def test_the_sentence_says_what_it_was_compared_with_and_its_price(carried):
    for words in ("crosses from donor to twin by activations", "unmodified", "random directions", "wrongly paired",
                  "nats a token", "few-shot prompt"):  # fmt: skip
        assert words in carried.sentence


def test_samples_lack_the_behaviour_before_and_show_it_after(carried):
    assert carried.samples
    dev = PROMPTS.texts[:8]
    places = [dev.index(one.prompt) for one in carried.samples]
    assert places == sorted(places)
    for one in carried.samples:
        assert not one.before.startswith(WORD)
        assert one.after.startswith(WORD)


def test_the_test_prompts_are_asked_of_nothing_that_is_chosen(pair, behaviour, cache, brief, monkeypatch):
    """Every prompt of the test split is first seen when fits and choices have been made."""
    tested, asked = set(task().test.texts), []
    chosen = running.choose

    def watching(*given, **more):
        asked.append("chosen")
        return chosen(*given, **more)

    def seen(lm, prompts, **more):
        asked.extend(one for one in cv.prompts.sets.as_prompts(prompts).texts if one in tested)
        return answer(lm, prompts, **more)

    answer = cv.generate
    monkeypatch.setattr(running, "choose", watching)
    for place in ("evaluation.outcomes", "transfer.distil.demonstrate", "evaluation.transferring.planning"):
        monkeypatch.setattr(f"commandv.{place}.generate", seen)
    cv.transfer_adapter(*pair[:1], behaviour, pair[1], task(), SETTINGS)
    assert asked.index("chosen") == 0
    assert len([one for one in asked if one == "chosen"]) == 2  # of the method's settings, then of the methods
    assert asked[:2] == ["chosen", "chosen"]


def test_a_run_that_was_cut_off_goes_on_where_it_was(pair, behaviour, cache, brief, monkeypatch):
    donor, recipient = pair

    def cut(*_given, **_more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(running, "certified", cut)
        with pytest.raises(KeyboardInterrupt):
            cv.transfer_adapter(donor, behaviour, recipient, task(), SETTINGS)
    monkeypatch.setattr("commandv.evaluation.outcomes.generate", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr("commandv.transfer.distil.demonstrate.generate", lambda *_, **__: pytest.fail("asked again"))
    assert cv.transfer_adapter(donor, behaviour, recipient, task(), SETTINGS).arrived


def test_the_random_control_is_the_mean_of_several_draws(pair, behaviour, cache, brief, monkeypatch):
    """A single draw may happen to do what is looked for."""
    asked = []
    drawn = running.make_arm

    def watched(name, material):
        if name == "random-in-span":
            asked.append(material.seed)
        return drawn(name, material)

    monkeypatch.setattr(running, "make_arm", watched)
    found = cv.transfer_adapter(*pair[:1], behaviour, pair[1], task(), SETTINGS)
    assert len(set(asked)) == 4
    arm = found.arms["random-in-span"]
    assert len(arm.labels[task().name]) == len(arm.words[task().name]) == SETTINGS.n_test
    assert len(arm.price["kl"]) == len(SETTINGS.passages)


def test_another_number_of_test_prompts_keeps_what_was_chosen(pair, behaviour, cache, brief):
    donor, recipient = pair
    job = prepare(donor, behaviour, recipient, task(), SETTINGS)
    running.run(job)
    fewer = prepare(donor, behaviour, recipient, task(), dataclasses.replace(SETTINGS, n_test=16))
    left = {one.name: one.seconds for one in plan(fewer).stages}
    assert left["tune: activations"] == left["profiles"] == left["donor's answers"] == 0
    assert left["test prompts"] > 0


def test_every_method_is_tried_and_what_does_not_apply_is_told(pair, behaviour, cache, brief, monkeypatch):
    donor, recipient = pair
    monkeypatch.setattr(
        "commandv.evaluation.arms.PRACTICE_SETTINGS", cv.TrainSettings(epochs=1, max_response=3, batch_size=4)
    )
    settings = dataclasses.replace(SETTINGS, by="auto,training", scales=(1.0,), n_asked=16)
    found = cv.transfer_adapter(donor, behaviour, recipient, task(), settings)
    assert set(found.certificate["tried"]) | set(found.certificate["missing"]) == set(METHODS)
    assert "activations" in found.certificate["tried"]
    assert found.arrived


def test_what_needs_no_answers_goes_on_where_the_donors_are_no_good(pair, behaviour, cache, brief, monkeypatch):
    monkeypatch.setattr("commandv.transfer.distil.demonstrate.loops", lambda text: True)
    settings = dataclasses.replace(SETTINGS, by="activations,context", scales=(1.0,))
    found = cv.transfer_adapter(*pair[:1], behaviour, pair[1], task(), settings)
    assert found.arrived
    assert "none of 12 answers can be used" in found.certificate["missing"]["donor's answers"]
    assert {"context", "few-shot"} <= set(found.certificate["missing"])
    assert "few-shot" not in found.sentence


def test_without_a_task_the_donor_is_the_measure(pair, behaviour, cache, brief, monkeypatch):
    donor, recipient = pair
    sets = {"builtin:questions-dev": PROMPTS[:16], "builtin:questions-test": PROMPTS[16:]}
    monkeypatch.setattr(job_module, "load_prompts", lambda name: sets.get(name, PROMPTS))
    found = cv.transfer_adapter(donor, behaviour, recipient, None, SETTINGS)
    assert found.certificate["task"]["accuracy_on_the_donor"] >= 0.75
    assert found.arrived


def test_the_how_to_runs_as_it_stands(pair, behaviour, cache, brief, monkeypatch, tmp_path):
    """On the twins: the names in it are those of the packaged models."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "transfer.md").read_text("utf-8"), re.S)
    carry, asked = cv.transfer_adapter, []

    def carried(donor, adapter, recipient, name, settings):
        asked.append((name, settings))
        return carry(donor, adapter, recipient, task(), SETTINGS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv, "load_model", dict(zip(("smollm2-135m-instruct", "gemma-3-270m"), pair, strict=True)).get)
    monkeypatch.setattr(cv, "load_adapter", lambda _: behaviour)
    monkeypatch.setattr(cv, "transfer_adapter", carried)
    exec(block[1], {})
    assert asked == [("numbered-list", cv.TransferSettings(by="activations"))]
    assert (tmp_path / "out" / "config.json").exists()


def test_methods_are_arms():
    assert methods("auto") == ["pasted", "context", "vocabulary", "answers"]
    assert methods("training, context") == ["context", "donor-answers"]
    assert methods("auto,training") == list(METHODS.values())
    assert all(ARMS[arm].by == by for by, arm in METHODS.items())
    with pytest.raises(InputError, match=r"by='magic': expected auto, or some of activations, context"):
        methods("magic")


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_donor_without_the_behaviour_is_told_with_its_rate(pair, behaviour, cache, brief):
    donor, recipient = pair
    with pytest.raises(InputError, match=r"does not show the behaviour .*\(0\.00 with its adapter .*, 0\.00 without"):
        cv.transfer_adapter(donor, behaviour, recipient, task("zebra"), SETTINGS)


def test_one_model_is_no_pair(pair, behaviour):
    same = cv.wrap_model(pair[0].model, pair[0].tokenizer, "copy", template="plain")
    with pytest.raises(InputError, match="the same model"):
        prepare(pair[0], behaviour, same, task())


def test_the_recipients_own_adapter_is_not_the_donors(pair, behaviour):
    donor, recipient = pair
    with pytest.raises(MismatchError, match="the recipient's own"):
        prepare(recipient, behaviour, donor, task())


@pytest.mark.parametrize("changes", [{"scales": ()}, {"scales": (0.0,)}, {"n_test": 0}, {"budget": -1.0}, {"by": "x"}])
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(InputError, match="expected"):
        dataclasses.replace(SETTINGS, **changes)
