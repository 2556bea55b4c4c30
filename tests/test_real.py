"""The packaged real models: small runs that tiny random models cannot stand in for."""

from __future__ import annotations

import pytest
import torch

import commandv as cv
from commandv.adapters.shipped import builtin_path
from commandv.errors import CommandVError
from commandv.models.lm import LM
from commandv.models.names import PACKAGED
from commandv.profiles.profile import Profile
from real import GEMMA, SMOL, load

pytestmark = pytest.mark.real

N = 40


@pytest.fixture(scope="module")
def smol() -> LM:
    return load(SMOL)


@pytest.fixture(scope="module")
def gemma() -> LM:
    return load(GEMMA)


@pytest.fixture(scope="module")
def profiles(smol, gemma) -> dict[str, Profile]:
    prompts = cv.load_prompts("builtin:general", limit=N)
    text = cv.load_prompts("builtin:text", limit=24)
    return {lm.id: cv.profile(lm, prompts, text=text, cache=False) for lm in (smol, gemma)}


def test_the_packaged_models_are_what_they_say(smol, gemma):
    assert set(PACKAGED) == {GEMMA, SMOL}
    assert (smol.d_model, smol.n_layers, smol.chat) == (576, 30, True)
    assert (gemma.d_model, gemma.n_layers) == (640, 18)


def test_smollm_answers(smol):
    (answer,) = cv.generate(smol, ["What is the capital of France? Answer in one word."], max_new_tokens=8)
    assert "Paris" in answer


def test_gemma_continues_as_text(gemma):
    (answer,) = cv.generate(gemma, ["What is the capital of France?"], max_new_tokens=12)
    assert "Paris" in answer


def test_a_batch_answers_as_each_prompt_alone(smol):
    prompts = ["What is tea?", "Name three rivers, and say in one sentence where each of them ends.", "Hi"]
    together = cv.generate(smol, prompts, max_new_tokens=10, batch_size=3)
    assert together == [cv.generate(smol, [prompt], max_new_tokens=10)[0] for prompt in prompts]
    assert len(set(together)) == 3


def test_profiles_of_both_models_pair_up(profiles, smol, gemma):
    from commandv.profiles.profile import paired_rows

    for lm in (smol, gemma):
        one = profiles[lm.id]
        assert one.n_layers == lm.n_layers
        assert all(torch.isfinite(one.layer(layer)).all() for layer in range(one.n_layers))
        assert not torch.equal(one.layer(3), one.layer(4))
    i, j, _ = paired_rows(profiles[GEMMA], profiles[SMOL], "end")
    assert len(i) >= N
    i, j, _ = paired_rows(profiles[GEMMA], profiles[SMOL], "text")
    assert len(i) > 40
    assert (profiles[GEMMA].keys[i] == profiles[SMOL].keys[j]).all()


def test_a_profile_does_not_depend_on_the_batch(smol, profiles):
    prompts = cv.load_prompts("builtin:general", limit=6)
    one, many = (cv.profile(smol, prompts, batch_size=size, cache=False, text=None) for size in (1, 6))
    for layer in (0, 15, 29):
        torch.testing.assert_close(one.layer(layer).float(), many.layer(layer).float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("donor", "recipient"), [(GEMMA, SMOL), (SMOL, GEMMA)])
def test_the_shipped_behaviour_pastes(donor, recipient, profiles, smol, gemma, tmp_path):
    try:
        path = builtin_path(f"numbered-list@{donor}")
    except CommandVError as error:
        pytest.skip(f"no shipped adapter yet: {error}")
    adapter = cv.load_adapter(path)
    lm = {SMOL: smol, GEMMA: gemma}
    adapter.model.require(lm[donor].ref, "the shipped adapter")
    link = cv.link(profiles[donor], profiles[recipient])
    pasted = link.paste(adapter)
    assert all(row.n > 0 and row.read_r2 <= 1 for row in link.fidelity(adapter))
    pasted = cv.load_adapter(cv.save(pasted, tmp_path / "pasted"))
    prompts = ["How do I make a good cup of tea?", "What are the benefits of walking?"]
    plain = cv.generate(lm[recipient], prompts, max_new_tokens=8)
    with cv.attach(lm[recipient], pasted, scale=3.0):
        changed = cv.generate(lm[recipient], prompts, max_new_tokens=8)
    assert changed != plain
    assert cv.generate(lm[recipient], prompts, max_new_tokens=8) == plain
    with cv.attach(lm[donor], adapter):
        native = cv.generate(lm[donor], prompts, max_new_tokens=8)
    assert all(answer.lstrip().startswith("1") for answer in native), native
