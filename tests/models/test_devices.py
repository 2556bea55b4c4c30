"""Models on several devices: all that runs them gives what it gives on one, and no tensors of two devices meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import commandv as cv
import devices
import tiny
from commandv.evaluation.price import reply_log_probs
from commandv.interop.baked import bake
from commandv.models.load import wrap_model
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering.reading import prompt_states
from toy import FORMS, SUBJECTS

PROMPTS = [form.format(subject) for subject in SUBJECTS for form in FORMS][:12]
EXAMPLES = PromptSet(tuple(Prompt(f"{i}", text, "The fox sleeps under a tree.") for i, text in enumerate(PROMPTS)))
ANSWERS = [f"The fox sleeps under {one}" for one in PROMPTS]


def everywhere(lm: cv.LM, positions: str) -> cv.Adapter:
    """An adapter on layers of either device."""
    return tiny.random_adapter(lm, (0, 1, 2, 3), positions, size=0.5)


def generated(lm: cv.LM, folder: Any) -> Any:
    with cv.attach(lm, everywhere(lm, "l1")), cv.attach(lm, everywhere(lm, "all"), scale=0.1):
        return cv.generate(lm, PROMPTS[:3], max_new_tokens=5)


def sampled(lm: cv.LM, folder: Any) -> Any:
    return cv.generate(lm, PROMPTS[:3], max_new_tokens=5, temperature=1.0, top_p=0.9, seed=1)


def profiled(lm: cv.LM, folder: Any) -> Any:
    made = cv.profile(lm, PROMPTS, text=EXAMPLES, places="words", cache=folder / "profile")
    return [made.layer(layer) for layer in range(lm.n_layers)]


def trained(lm: cv.LM, folder: Any) -> Any:
    settings = cv.TrainSettings(epochs=1, batch_size=4, held_out=0)
    return tensors(cv.train(lm, EXAMPLES, cv.LoReFT(rank=2, layers="all_layers"), settings))


def demonstrated(lm: cv.LM, folder: Any) -> Any:
    made = cv.demonstrate(lm, everywhere(lm, "l1"), PROMPTS, answers=ANSWERS)
    assert made.changes is not None
    return list(made.changes)


def in_context(lm: cv.LM, folder: Any) -> Any:
    shown = cv.demonstrate(None, None, PROMPTS, answers=ANSWERS)
    return tensors(cv.distil(lm, shown, by=cv.Context(size=4, sets=2, least=-100), rank=2))


def in_words(lm: cv.LM, folder: Any) -> Any:
    shown = cv.demonstrate(lm, everywhere(lm, "l1"), PROMPTS, answers=ANSWERS)
    return tensors(cv.distil(lm, shown, by=cv.Vocabulary(rounds=1), rank=2))


def priced(lm: cv.LM, folder: Any) -> Any:
    return reply_log_probs(lm, EXAMPLES, everywhere(lm, "all"))


def read(lm: cv.LM, folder: Any) -> Any:
    return [prompt_states(lm, EXAMPLES, cv.Positions.parse("l1"))]


def baked(lm: cv.LM, folder: Any) -> Any:
    vector = cv.steering_vector(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)))
    (one,) = vector
    constant = cv.Adapter({1: (one,), 3: (one,)}, lm.ref, "constant")
    bake(lm, constant, folder / "baked")
    return cv.generate(cv.load_model(folder / "baked", dtype="float32"), PROMPTS[:2], max_new_tokens=3)


def named(lm: cv.LM, folder: Any) -> Any:
    return lm.ref.weights


def tensors(adapter: cv.Adapter) -> list[torch.Tensor]:
    edits = [edit for _, many in sorted(adapter.interventions.items()) for edit in many]
    return [value for edit in edits for _, value in sorted(edit.tensors().items())]


WORK: dict[str, Callable[[cv.LM, Any], Any]] = {
    "generate": generated,
    "sample": sampled,
    "profile": profiled,
    "train": trained,
    "demonstrate": demonstrated,
    "distil context": in_context,
    "distil vocabulary": in_words,
    "price": priced,
    "states": read,
    "bake": baked,
    "name": named,
}


def one_device(tied: bool) -> cv.LM:
    return wrap_model(tiny.tiny_model(tie_word_embeddings=tied), tiny.tiny_tokenizer(chat=True), "tiny")


def two_devices(tied: bool) -> cv.LM:
    model = devices.spread(tiny.tiny_model(tie_word_embeddings=tied), at=2)
    return wrap_model(model, tiny.tiny_tokenizer(chat=True), "tiny")


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("what", WORK)
def test_two_devices_give_what_one_gives(what, tied, monkeypatch, tmp_path):
    expected = WORK[what](one_device(tied), tmp_path / "one")
    with devices.fakes(monkeypatch):
        found = WORK[what](two_devices(tied), tmp_path / "two")
    if isinstance(found, list) and isinstance(found[0], torch.Tensor):
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one.cpu().float(), other.float(), atol=1e-5)
    else:
        assert found == expected


def test_fake_devices_refuse_to_meet(monkeypatch):
    with devices.fakes(monkeypatch):
        lm = two_devices(tied=False)
        places = {str(one.device) for one in lm.model.parameters()}
        assert places == {"lazy:0", "lazy:1"}
        assert lm.device == torch.device("lazy:0")
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            lm.model.lm_head.weight + lm.model.get_input_embeddings().weight
