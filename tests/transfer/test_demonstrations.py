"""Files of demonstrations: what is written is read, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import commandv as cv
from commandv.errors import FormatError, InputError
from commandv.models.identity import ModelRef
from commandv.transfer.distil.demonstrations import Changes

CHANGES = Changes(
    places=torch.tensor([[0, 0], [0, 3], [1, 0]]),
    tokens=torch.tensor([[0, 1], [1, 2], [2, 0]]),
    ratio=torch.tensor([[1.0, -2.0], [0.5, 0.25], [3.0, -1.0]]),
    log_p=torch.tensor([[-0.5, -3.0], [-1.0, -2.0], [-0.25, -4.0]]),
    rest=torch.tensor([-1.0, 0.5, -2.0]),
    divergence=torch.tensor([1.0, 0.5, 0.25]),
)
MADE = cv.Demonstrations(
    prompts=("What is tea?", "Who are you?"),
    answers=("Arr, naïve 茶", "Me"),
    donor=ModelRef("donor", d_model=8),
    name="pirate",
    vocabulary=("Arr", " tea", ""),
    changes=CHANGES,
    max_new_tokens=12,
    dropped={"looping": 2},
)


def test_what_is_written_is_read(tmp_path):
    cv.save_demonstrations(MADE, tmp_path / "pirate")
    again = cv.load_demonstrations(tmp_path / "pirate")
    for name in ("prompts", "answers", "donor", "name", "vocabulary", "max_new_tokens", "dropped", "hash"):
        assert getattr(again, name) == getattr(MADE, name), name
    for one, two in zip(again.changes, CHANGES, strict=True):
        assert torch.equal(one, two)
        assert one.dtype == two.dtype
    card = json.loads((tmp_path / "pirate" / "config.json").read_text("utf-8"))
    assert card["loop_rate"] == 0.5
    assert card["mean_divergence"] == pytest.approx(7 / 12)


def test_texts_only_are_read_as_such(tmp_path):
    cv.save_demonstrations(replace(MADE, changes=None, vocabulary=()), tmp_path)
    assert cv.load_demonstrations(tmp_path).changes is None


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("format_version", 99, "version 1 to"),
        ("format", "commandv-adapter", "expected a commandv-demonstrations"),
        ("answers", ["Arr", "You"], "have changed since"),
        ("prompts", ["What is tea?"], "2 answers"),
        ("vocabulary", ["Arr"], "not there"),
        ("donor", {"id": 7}, "config.json, donor.id"),
        ("extra", 1, "config.json, extra"),
    ],
)
def test_changed_cards_are_refused(tmp_path, field, value, said):
    cv.save_demonstrations(MADE, tmp_path)
    file = tmp_path / "config.json"
    card = json.loads(file.read_text("utf-8"))
    card[field] = value
    file.write_text(json.dumps(card), "utf-8")
    with pytest.raises(FormatError, match=said):
        cv.load_demonstrations(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    cv.save_demonstrations(MADE, tmp_path)
    file = next(tmp_path.glob("tensors-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match="content has changed"):
        cv.load_demonstrations(tmp_path)


def test_an_adapter_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match="left alone"):
        cv.save_demonstrations(MADE, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "wrong",
    [
        {"answers": ("Arr", " ")},
        {"answers": ("Arr", "\ud800")},
        {"answers": ("Arr", 5)},
        {"prompts": ("", "Who?")},
        {"dropped": {"looping": -2}},
        {"max_new_tokens": 0},
    ],
)
def test_what_is_no_demonstration(wrong):
    with pytest.raises(InputError, match=r"texts that are not empty|expected counts|expected tuple of str"):
        replace(MADE, **wrong)


@pytest.mark.parametrize("answers", ["ab", {"What?": "a", "Who?": "b"}, [None, "b"], [1, 2], ["a", "\ud800"]])
def test_answers_that_are_none(answers):
    with pytest.raises(
        InputError, match=r"answers is a .*, expected Sequence of str|answers: expected a list of texts"
    ):
        cv.demonstrate(None, None, ["What?", "Who?"], answers=answers)


def test_answers_may_come_one_by_one():
    made = cv.demonstrate(None, None, ["What?", "Who?"], answers=(f"answer {i}" for i in range(2)))
    assert made.answers == ("answer 0", "answer 1")
