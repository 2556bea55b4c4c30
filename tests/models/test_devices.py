"""Models on several devices: all that runs them gives what it gives on one, and no tensors of two devices meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import commandv as cv
import devices
import tiny
from commandv.models.load import wrap_model
from toy import FORMS, SUBJECTS

PROMPTS = [form.format(subject) for subject in SUBJECTS for form in FORMS][:12]
ANSWERS = [f"The fox sleeps under {one}" for one in PROMPTS]


def everywhere(lm: cv.LM, positions: str) -> cv.Adapter:
    """An adapter on layers of either device."""
    return tiny.random_adapter(lm, (0, 1, 2, 3), positions, size=0.5)


def generated(lm: cv.LM) -> Any:
    with cv.attach(lm, everywhere(lm, "l1")), cv.attach(lm, everywhere(lm, "all"), scale=0.1):
        return cv.generate(lm, PROMPTS[:3], max_new_tokens=5)


def demonstrated(lm: cv.LM) -> Any:
    made = cv.demonstrate(lm, everywhere(lm, "l1"), PROMPTS, answers=ANSWERS)
    assert made.changes is not None
    return list(made.changes)


def in_context(lm: cv.LM) -> Any:
    shown = cv.demonstrate(None, None, PROMPTS, answers=ANSWERS)
    return tensors(cv.distil(lm, shown, by=cv.Context(size=4, sets=2, least=-100), rank=2))


def named(lm: cv.LM) -> Any:
    return lm.ref.weights


def tensors(adapter: cv.Adapter) -> list[torch.Tensor]:
    edits = [edit for _, many in sorted(adapter.interventions.items()) for edit in many]
    return [value for edit in edits for _, value in sorted(edit.tensors().items())]


WORK: dict[str, Callable[[cv.LM], Any]] = {
    "generate": generated,
    "demonstrate": demonstrated,
    "distil context": in_context,
    "name": named,
}


def one_device(tied: bool) -> cv.LM:
    return wrap_model(tiny.tiny_model(tie_word_embeddings=tied), tiny.tiny_tokenizer(chat=True), "tiny")


def two_devices(tied: bool) -> cv.LM:
    model = devices.spread(tiny.tiny_model(tie_word_embeddings=tied), at=2)
    return wrap_model(model, tiny.tiny_tokenizer(chat=True), "tiny")


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("what", WORK)
def test_two_devices_give_what_one_gives(what, tied, monkeypatch):
    expected = WORK[what](one_device(tied))
    with devices.fakes(monkeypatch):
        found = WORK[what](two_devices(tied))
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
