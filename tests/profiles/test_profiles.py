"""Profiles: what their rows are, which rows of two belong together, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import commandv as cv
import tiny
from commandv.errors import FormatError, InputError, MismatchError
from commandv.models.encoding import encode, pad
from commandv.profiles import work
from commandv.profiles.profile import END, Profile, paired_rows
from commandv.prompts.sets import Prompt, PromptSet, load_prompts
from places import DATA
from profiled import ONE_STEP, PROMPTS, TEXT, same
from stored import data_file, replace_part

ARCHS = ("llama", "gpt2", "bloom", "opt", "gemma3_text", "gptj")


def hooked(lm, ids, layer):
    """The output of a block for one row of token ids, by a hook of our own."""
    seen = []
    handle = lm.blocks[layer].register_forward_hook(
        lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        lm.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0].to(torch.bfloat16)


# -- what the rows are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_end_rows_are_the_outputs_at_the_last_prompt_token(arch):
    lm = tiny.tiny_lm(arch)
    one = cv.profile(lm, PROMPTS, cache=False, text=None)
    assert one.keys.tolist() == [[number, END] for number in range(len(PROMPTS))]
    assert sorted(one.activations) == list(range(tiny.LAYERS))
    for number, prompt in enumerate(PROMPTS):
        ids = encode(lm, prompt).ids
        for layer in range(tiny.LAYERS):
            assert one.layer(layer).dtype == torch.bfloat16
            assert_close(one.layer(layer)[number], hooked(lm, ids, layer)[-1], **ONE_STEP)


@pytest.mark.parametrize("chat", [False, True])
def test_text_rows_are_the_outputs_where_words_end(chat):
    lm = tiny.tiny_lm(chat=chat)
    one = cv.profile(lm, PROMPTS, text=TEXT, places="words", cache=False)
    rows = [(i, number - len(PROMPTS), end) for i, (number, end) in enumerate(one.keys.tolist()) if end != END]
    assert {number for _, number, _ in rows} == set(range(len(TEXT)))
    for i, number, end in rows:
        prompt = TEXT.prompts[number]
        text = prompt.response or prompt.text
        assert text[:end].split() == text.split()[: len(text[:end].split())]  # never inside a word
        encoded = encode(lm, prompt.text, prompt.response)
        index = max(k for k, stop in enumerate(encoded.text_ends) if stop == end)
        assert lm.tokenizer.decode(encoded.ids[: index + 1]).endswith(text[:end])
        assert_close(one.layer(2)[i], hooked(lm, encoded.ids, 2)[index], **ONE_STEP)


@pytest.mark.parametrize("arch", ARCHS)
def test_batch_size_and_padding_change_nothing(arch):
    lm = tiny.tiny_lm(arch)
    one = cv.profile(lm, PROMPTS, text=TEXT, batch_size=1, cache=False)
    for size, side in ((16, "right"), (16, "left"), (3, "left")):
        same(one, cv.profile(lm, PROMPTS, text=TEXT, batch_size=size, padding=side, cache=False))


def test_two_tokenizers_share_text_rows():
    donor, recipient = tiny.tiny_lm(vocab=280), tiny.tiny_lm("gpt2", vocab=400, bos=False)
    assert encode(donor, PROMPTS[2]).ids[1:] != encode(recipient, PROMPTS[2]).ids
    first, second = (cv.profile(lm, PROMPTS, text=TEXT, places="words", cache=False) for lm in (donor, recipient))
    i, j, prompts = paired_rows(first, second, "text")
    assert np.array_equal(first.keys[i], second.keys[j])
    assert (first.keys[i, 1] != END).all()
    assert len(i) == (first.keys[:, 1] != END).sum() > 30
    assert set(prompts) == {len(PROMPTS) + number for number in range(len(TEXT))}
    i, j, prompts = paired_rows(first, second, "end")
    assert prompts.tolist() == list(range(len(PROMPTS) + len(TEXT)))
    assert np.array_equal(first.keys[i], second.keys[j])
    assert len(paired_rows(first, second, "both")[0]) == len(first)


def test_rows_that_only_one_tokenizer_has_are_left_out():
    lm = tiny.tiny_lm()
    whole = cv.profile(lm, PROMPTS, cache=False, text=None)
    keep = [0, 2, 5]
    part = Profile({0: whole.layer(0)[keep]}, whole.keys[keep], whole.model, whole.prompts)
    i, j, prompts = paired_rows(whole, part, "end")
    assert (i.tolist(), j.tolist(), prompts.tolist()) == (keep, [0, 1, 2], keep)


def test_rows_per_text():
    lm = tiny.tiny_lm()
    one = cv.profile(lm, PROMPTS, text=TEXT, places="words", rows_per_text=3, cache=False)
    numbers, counts = np.unique(one.keys[one.keys[:, 1] != END, 0], return_counts=True)
    assert len(numbers) == len(TEXT)
    assert counts.max() == 3
    assert one.prompts != cv.profile(lm, PROMPTS, text=TEXT, places="words", cache=False).prompts


def test_max_length_keeps_the_end_of_long_prompts():
    lm = tiny.tiny_lm()
    cut = cv.profile(lm, PROMPTS, max_length=24, cache=False, text=None)
    ids = encode(lm, PROMPTS[2], max_length=24).ids
    assert_close(cut.layer(1)[2], hooked(lm, ids, 1)[-1], **ONE_STEP)
    assert_close(cut.layer(1)[1], cv.profile(lm, PROMPTS, cache=False, text=None).layer(1)[1], **ONE_STEP)


def test_the_profile_of_a_model_with_an_adapter_is_of_the_changed_stream(cache):
    lm = tiny.tiny_lm()
    plain = cv.profile(lm, PROMPTS, text=None)
    vector = torch.linspace(-2, 2, tiny.D)
    with cv.attach(lm, cv.Adapter({1: cv.steering_vector(vector)}, lm.ref)):
        with pytest.raises(InputError, match="cache=False"):
            cv.profile(lm, PROMPTS, text=None)
        moved = cv.profile(lm, PROMPTS, cache=False, text=None)
    assert_close(moved.layer(1).float(), plain.layer(1).float() + vector, rtol=0.02, atol=0.05)
    same(cv.profile(lm, PROMPTS, cache=False, text=None), plain)
    assert not any(block._forward_hooks for block in lm.blocks)


@pytest.mark.parametrize("prompts", [[], ["one", " "]])
def test_empty_prompts(lm, prompts):
    with pytest.raises(InputError, match=r"empty|no prompts"):
        cv.profile(lm, prompts, text=None)


def test_a_prompt_longer_than_the_context():
    with pytest.raises(InputError, match="longer than the context"):
        cv.profile(tiny.tiny_lm(max_position_embeddings=20), PROMPTS, text=None)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_non_finite_activations_name_layer_and_prompt(batch_size):
    lm = tiny.tiny_lm()
    others = [encode(lm, prompt).ids for prompt in PROMPTS if prompt != PROMPTS[4]]
    odd = set(encode(lm, PROMPTS[4]).ids).difference(*others).pop()
    seen = {}
    lm.model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: seen.update(ids=args[0]))

    def overflow(_module, _inputs, output):
        return torch.where((seen["ids"] == odd).any(1)[:, None, None], torch.inf, output)

    handle = lm.blocks[2].mlp.register_forward_hook(overflow)
    with pytest.raises(FormatError, match=r"layer 2 for prompt 5\b.*float32"):
        cv.profile(lm, PROMPTS, batch_size=batch_size, cache=False, text=None)
    handle.remove()
    cv.profile(lm, PROMPTS, batch_size=batch_size, cache=False, text=None)


def test_golden_profile_of_version_1_still_loads_and_can_be_replaced(tmp_path):
    one = cv.load_profile(DATA / "v1" / "profile")
    assert one.layer(0).tolist() == [[1, -2, 0.5, 0], [0, 3, -0.25, 8]]
    assert one.layer(2).tolist() == [[0.125, 0, 1, -1], [2, 4, 6, -16]]
    assert one.keys.tolist() == [[0, END], [1, 5]]
    assert (one.model.id, one.d_model, one.n_layers, one.prompts) == ("some/model", 4, 3, "0123456789abcdef")
    copy = tmp_path / "copy"
    shutil.copytree(DATA / "v1" / "profile", copy)
    cv.save_profile(one, copy)
    assert torch.equal(cv.load_profile(copy).layer(2), one.layer(2))
    assert {file.name for file in copy.iterdir()} == {
        "config.json", *(data_file(copy, part).name for part in ("keys", "layer-000", "layer-002"))
    }  # fmt: skip


# -- damaged and mismatched profiles ----------------------------------------------------------------------------------


def _edit(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def _truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "not a commandv-profile"),
        (lambda path: (path / "config.json").write_text("{"), "not a commandv-profile"),
        (lambda path: (path / "config.json").write_text("[]"), "not a commandv-profile"),
        (lambda path: (path / "config.json").write_text("{}"), "expected a commandv-profile"),
        (lambda path: _edit(path, format_version=99), "version 99.*newer commandv"),
        (lambda path: _edit(path, format="commandv-adapter"), "expected a commandv-profile"),
        (lambda path: _edit(path, layers=[0, 1, 9]), "damaged"),
        (lambda path: _edit(path, model={"id": "a", "wings": 2}), "damaged"),
        (lambda path: _edit(path, centred=True), "says 'centred', which this version does not know"),
        (lambda path: data_file(path, "keys").unlink(), "damaged"),
        (lambda path: _truncate(data_file(path, "keys")), "damaged"),
        (lambda path: _truncate(data_file(path, "layer-002")), "damaged"),
        (lambda path: data_file(path, "layer-001").write_bytes(b""), "damaged"),
        (lambda path: replace_part(path, load_file(data_file(path, "keys")), "layer-001"), "damaged"),
        (lambda path: _other_rows(path, 3, tiny.D), "layer 1: got shape .3, 32.*expected .6"),
        (lambda path: _other_rows(path, 6, 7), "layer 1: got shape"),
    ],
)  # fmt: skip
def test_a_damaged_profile(lm, tmp_path, damage, message):
    path = tmp_path / "mine"
    cv.profile(lm, PROMPTS, cache=path, text=None)
    damage(path)
    with pytest.raises(FormatError, match=message):
        cv.load_profile(path)


def _other_rows(path, n, width):
    replace_part(path, {"rows": torch.zeros(n, width, dtype=torch.bfloat16)}, "layer-001")


def test_profiles_of_other_prompts_do_not_pair(lm):
    first = cv.profile(lm, PROMPTS, cache=False, text=None)
    for other in (PROMPTS[:5], PROMPTS[::-1]):
        with pytest.raises(MismatchError, match="different prompts"):
            paired_rows(first, cv.profile(lm, other, cache=False, text=None), "end")
    with pytest.raises(MismatchError, match="different prompts"):
        paired_rows(first, cv.profile(lm, PROMPTS, text=TEXT, cache=False), "end")


def test_too_few_rows_do_not_pair(lm):
    one = cv.profile(lm, PROMPTS[:1], cache=False, text=None)
    with pytest.raises(InputError, match=r"1 shared end rows .* expected at least 2"):
        paired_rows(one, one, "end")
    several = cv.profile(lm, PROMPTS, cache=False, text=None)
    with pytest.raises(InputError, match=r"0 shared text rows .*builtin:text"):
        paired_rows(several, several, "text")


def test_a_layer_the_profile_does_not_hold(lm):
    with pytest.raises(InputError, match=r"holds layers \[0, 1, 2, 3\], not 4"):
        cv.profile(lm, PROMPTS, cache=False, text=None).layer(4)


def test_built_in_texts_give_shared_rows_for_two_tokenizers():
    text = load_prompts("builtin:text", limit=24)
    first, second = (
        cv.profile(lm, PROMPTS, text=text, places="words", rows_per_text=8, cache=False)
        for lm in (tiny.tiny_lm(vocab=280, max_position_embeddings=2048), tiny.tiny_lm(max_position_embeddings=2048))
    )
    assert len(paired_rows(first, second, "text")[0]) >= 0.95 * 24 * 8


def test_left_padding_is_what_pad_makes(lm):
    rows = [encode(lm, prompt).ids for prompt in PROMPTS]
    batch = pad(lm, rows, "left")
    at = (torch.arange(len(rows)), torch.full((len(rows),), batch.input_ids.shape[1] - 1))
    direct = work.read_rows(lm, batch, at)
    one = cv.profile(lm, PROMPTS, cache=False, text=None)
    for layer, values in direct.items():
        assert_close(values, one.layer(layer), **ONE_STEP)


def test_line_rows_are_the_outputs_that_are_about_to_start_a_line():
    lm = tiny.tiny_lm(vocab=280, max_position_embeddings=2048)
    text = PromptSet((Prompt("Say three things", "one two\nthree\n\nfour five\n"),))
    one = cv.profile(lm, PROMPTS, text=text, cache=False)
    assert one.keys[one.keys[:, 1] != END][:, 1].tolist() == [8, 15]


def test_text_rows_are_there_unless_they_are_left_out(monkeypatch):
    """Converters fitted without them ruin some models in silence."""
    asked = []
    monkeypatch.setattr("commandv.profiles.work.load_prompts", lambda name: asked.append(name) or TEXT)
    lm = tiny.tiny_lm()
    one = cv.profile(lm, PROMPTS, cache=False)
    assert asked == ["builtin:text"]
    assert (one.keys[:, 1] != END).any()
    assert (cv.profile(lm, PROMPTS, text=None, cache=False).keys[:, 1] == END).all()


@pytest.mark.parametrize("n_layers", [0, 2])
def test_layers_that_the_model_does_not_have_are_refused(n_layers):
    made = cv.profile(tiny.tiny_lm(), ["one", "two"], cache=False, text=None)
    with pytest.raises(FormatError, match=f"of a model of {n_layers} layers"):
        dataclasses.replace(made, model=dataclasses.replace(made.model, n_layers=n_layers))


def test_passages_may_be_texts_and_a_path_a_text(lm, tmp_path):
    text = ["One line.\nAnother line of words.\nA third one."]
    named = PromptSet((Prompt(text[0]),))
    kept = cv.profile(lm, (one for one in PROMPTS), text=text, cache=str(tmp_path / "p"))
    assert kept.path == tmp_path / "p"
    whole = cv.profile(lm, PROMPTS, text=named, cache=False)
    assert torch.equal(kept.layer(1), whole.layer(1))


@pytest.mark.parametrize("wrong", [{"padding": "middle"}, {"places": "letters"}, {"rows_per_text": 0}])
def test_choices_that_are_none(lm, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        cv.profile(lm, PROMPTS, cache=False, **wrong)
