"""Pasting on made-up profiles whose relation is known, so that every result can be told in advance."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from commandv.adapter import Adapter, Intervention, steering_vector
from commandv.bridge import held_out_prompts
from commandv.carried import Carried
from commandv.convert import FITTERS, FactorStore, Pinv, ReducedRank, Ridge
from commandv.convert.factor import Cholesky, Factor
from commandv.errors import InputError, MismatchError
from commandv.held_out import cosine, fidelity, r2
from commandv.match import explicit, nearest
from commandv.models import ModelRef
from commandv.pasting import paste, random_like
from commandv.profiles import END, Profile
from commandv.store import _parts

N, D_DONOR, D_RECIPIENT, LATENT, RANK = 80, 10, 14, 6, 3
DONOR, RECIPIENT = ModelRef("donor", "d1", D_DONOR, 6), ModelRef("recipient", "r1", D_RECIPIENT, 9)
FIT = [pytest.param(cls(), id=name) for name, cls in FITTERS.items()] + [
    pytest.param(Pinv(exact=True), id="pinv-exact"),
    pytest.param(ReducedRank(2), id="reduced-rank-2"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def end_keys(n: int) -> np.ndarray:
    return np.stack([np.arange(n), np.full(n, END)], 1)


def profile_of(layers: dict[int, Tensor], ref: ModelRef, keys: np.ndarray | None = None, prompts: str = "p") -> Profile:
    layers = {layer: rows.float() for layer, rows in layers.items()}
    n, d = next(iter(layers.values())).shape
    return Profile(layers, end_keys(n) if keys is None else keys, replace(ref, d_model=d), prompts)


def both(n: int = N, *, noise: float = 0.05, latent: int = LATENT, keys: np.ndarray | None = None):
    """Two models that see the same few things, each in its own basis, off-centre and with noise of its own."""
    found = []
    for ref, seed in ((DONOR, 100), (RECIPIENT, 200)):
        layers = {}
        for layer in range(ref.n_layers):
            seen = normal(n, latent, seed=1)
            own = 2 * normal(ref.d_model, seed=seed + layer) + noise * normal(n, ref.d_model, seed=seed + 50 + layer)
            layers[layer] = seen @ normal(latent, ref.d_model, seed=seed + 20 + layer) + own
        found.append(profile_of(layers, ref, keys))
    return tuple(found)


def intervention(seed: int = 0, *, activation: str = "linear", d: int = D_DONOR, rank: int = RANK) -> Intervention:
    read, bias, write = normal(rank, d, seed=seed), normal(rank, seed=seed + 1), normal(rank, d, seed=seed + 2)
    return Intervention(read.float(), bias.float(), write.float(), activation)


def adapter_of(*layers: int, activation: str = "linear", ref: ModelRef = DONOR) -> Adapter:
    made = {layer: (intervention(10 * layer, activation=activation, d=ref.d_model),) for layer in layers}
    return Adapter(made, ref, "test")


def delta(adapter: Adapter, layer: int, h: Tensor) -> Tensor:
    many = adapter.interventions[layer]
    return sum((one if isinstance(one, Carried) else replace(one, **doubled(one))).delta(h.double()) for one in many)


def doubled(one: Intervention) -> dict[str, Tensor]:
    return {"read": one.read.double(), "bias": one.bias.double(), "write": one.write.double()}


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def same_tensors(a: Adapter, b: Adapter) -> bool:
    return a.layers == b.layers and all(
        torch.equal(mine, other)
        for layer in a.layers
        for one, two in zip(a.interventions[layer], b.interventions[layer], strict=True)
        for mine, other in zip(_parts(one).values(), _parts(two).values(), strict=True)
    )


# -- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("n", [9, 14, N], ids=["N<d", "N=d", "N>d"])
@pytest.mark.parametrize("fit", FIT)
def test_folded_adapter_acts_as_the_unfolded_one(fit, n, activation):
    donor, recipient = both(n)
    adapter = adapter_of(4, activation=activation)
    pasted = paste(adapter, donor, recipient, fit=fit, holdout=0)
    assert pasted.layers == [6]
    into, back = fit(recipient.layer(6), donor.layer(4)), fit(donor.layer(4), recipient.layer(6))
    h = recipient.layer(6).double() + normal(n, D_RECIPIENT, seed=3)
    seen = into(h)
    assert relative(delta(pasted, 6, h), back(seen + delta(adapter, 4, seen)) - back(seen)) < 1e-3


@pytest.mark.parametrize("fit", FIT)
def test_an_adapter_that_does_nothing_is_pasted_as_one(fit):
    donor, recipient = both()
    nothing = adapter_of(4).scaled(0.0)
    assert not delta(paste(nothing, donor, recipient, fit=fit), 6, recipient.layer(6)).any()


def test_pasting_onto_the_same_model_gives_the_adapter_back():
    donor, _ = both()
    adapter = adapter_of(4, 5, activation="relu")
    pasted = paste(adapter, donor, donor, fit=Pinv(exact=True), layers="all_layers")
    for layer in (4, 5):
        h = normal(30, D_DONOR, seed=8)
        assert relative(delta(pasted, layer, h), delta(adapter, layer, h)) < 1e-4


def test_with_few_prompts_self_paste_reads_and_writes_what_the_rows_span():
    donor, _ = both(6)
    adapter = adapter_of(4)
    pasted = paste(adapter, donor, donor, fit=Pinv(exact=True), holdout=0)
    rows = donor.layer(4).double()
    onto_rows = torch.linalg.pinv(rows) @ rows
    assert relative(delta(pasted, 4, rows), delta(adapter, 4, rows) @ onto_rows) < 1e-4


def test_pasting_into_a_rotated_twin_gives_the_rotated_adapter():
    donor, _ = both()
    turn = rotation(D_DONOR, 5)
    twin = profile_of({layer: rows.double() @ turn for layer, rows in donor.activations.items()}, DONOR)
    adapter = adapter_of(5, activation="relu")
    pasted = paste(adapter, donor, twin, fit=Pinv(exact=True))
    h = normal(30, D_DONOR, seed=8)
    assert relative(delta(pasted, 5, h @ turn), delta(adapter, 5, h) @ turn) < 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_rotating_either_basis_changes_nothing_for_pinv(exact):
    donor, recipient = both()
    adapter, fit = adapter_of(4, activation="relu"), Pinv(exact=exact)
    expected, h = paste(adapter, donor, recipient, fit=fit), normal(30, D_RECIPIENT, seed=8)
    turn = rotation(D_RECIPIENT, 3)
    turned = profile_of({layer: rows.double() @ turn for layer, rows in recipient.activations.items()}, RECIPIENT)
    got = paste(adapter, donor, turned, fit=fit)
    assert relative(delta(got, 6, h @ turn), delta(expected, 6, h) @ turn) < 1e-4
    turn = rotation(D_DONOR, 4)
    turned = profile_of({layer: rows.double() @ turn for layer, rows in donor.activations.items()}, DONOR)
    moved = adapter.map(lambda one: replace(one, read=one.read @ turn.float(), write=one.write @ turn.float()))
    assert relative(delta(paste(moved, turned, recipient, fit=fit), 6, h), delta(expected, 6, h)) < 1e-4


@pytest.mark.parametrize("fit", FIT)
def test_the_gauge_of_an_adapter_does_not_matter(fit):
    donor, recipient = both()
    m = (torch.eye(RANK) + 0.4 * normal(RANK, RANK, seed=11)).float()
    adapter = adapter_of(4)
    other = adapter.map(
        lambda one: Intervention(m @ one.read, m @ one.bias, torch.linalg.inv(m).T @ one.write, one.activation)
    )
    h = recipient.layer(6)
    first, second = (delta(paste(one, donor, recipient, fit=fit), 6, h) for one in (adapter, other))
    assert relative(second, first) < 1e-3


def test_a_steering_vector_is_carried_as_a_difference():
    """Without the bias of the writing converter, and whatever the state."""
    donor, recipient = both()
    v = normal(D_DONOR, seed=2).float()
    pasted = paste(Adapter({4: steering_vector(v)}, DONOR, "v"), donor, recipient, holdout=0)
    expected = Ridge()(donor.layer(4), recipient.layer(6)).push(v[None])[0]
    torch.testing.assert_close(delta(pasted, 6, normal(5, D_RECIPIENT)), expected.expand(5, -1), rtol=1e-4, atol=1e-5)


def test_donor_layers_that_meet_add_up():
    donor, recipient = both()
    adapter = adapter_of(2, 3, 4)
    together = paste(adapter, donor, recipient, match=explicit({2: 7, 3: 8, 4: 7}))
    assert together.layers == [7, 8]
    apart = [paste(adapter.on_layers([layer]), donor, recipient, match=explicit({layer: 7})) for layer in (2, 4)]
    h = recipient.layer(7)
    assert relative(delta(together, 7, h), sum(delta(one, 7, h) for one in apart)) < 1e-6


def test_layers_and_matcher_say_where_it_acts():
    donor, recipient = both()
    adapter = adapter_of(0, 1, 2, 3, 4, 5)
    assert paste(adapter, donor, recipient).layers == [6, 7]  # floor(1.5 l) within 6, 7, 8
    assert paste(adapter, donor, recipient, layers="all_layers").layers == [0, 1, 3, 4, 6, 7]
    assert paste(adapter, donor, recipient, layers=[1, 2, 3]).layers == [1, 3]
    assert paste(adapter, donor, recipient, match=nearest, layers="7,8").layers == [7]


def test_scale_multiplies_what_is_added():
    donor, recipient = both()
    adapter, h = adapter_of(4, activation="tanh"), recipient.layer(6)
    plain, scaled = (paste(adapter, donor, recipient, scale=scale) for scale in (1.0, -2.5))
    torch.testing.assert_close(delta(scaled, 6, h), -2.5 * delta(plain, 6, h), rtol=1e-5, atol=1e-6)
    assert scaled.provenance["scale"] == -2.5


def test_profiles_are_joined_by_key_not_by_place():
    donor, recipient = both()
    expected = paste(adapter_of(4), donor, recipient)
    order = np.random.default_rng(0).permutation(N)
    mixed = profile_of({layer: rows[order] for layer, rows in donor.activations.items()}, DONOR, end_keys(N)[order])
    # The other one has a prompt more, which counts for nothing.
    longer = profile_of(
        {layer: torch.cat([1e3 * rows[:1], rows]) for layer, rows in recipient.activations.items()},
        RECIPIENT,
        np.concatenate([[[N + 5, END]], end_keys(N)]),
    )
    assert same_tensors(paste(adapter_of(4), mixed, longer), expected)


# -- end rows for reading, text rows for writing ----------------------------------------------------------------------


def with_text(n: int = 40, per_text: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Keys of n prompts' ends and of texts after them, and which of them are text."""
    text = np.array([[n + i, 4 * (k + 1)] for i in range(n) for k in range(per_text)])
    keys = np.concatenate([end_keys(n), text])
    return keys, keys[:, 1] >= 0


def changed(profile: Profile, rows: np.ndarray) -> Profile:
    noise = 3 * normal(int(rows.sum()), profile.d_model, seed=66).float()
    layers = {}
    for layer, values in profile.activations.items():
        layers[layer] = values.clone()
        layers[layer][torch.from_numpy(rows)] += noise
    return replace(profile, activations=layers)


def test_text_rows_serve_writing_and_end_rows_reading():
    keys, text = with_text()
    donor, recipient = both(len(keys), keys=keys)
    adapter = adapter_of(4)
    (plain,) = paste(adapter, donor, recipient).interventions[6]
    (other_text,) = paste(adapter, changed(donor, text), recipient).interventions[6]
    (other_ends,) = paste(adapter, changed(donor, ~text), recipient).interventions[6]
    assert torch.equal(other_text.read, plain.read)
    assert not torch.allclose(other_text.write, plain.write, rtol=0.01)
    assert torch.equal(other_ends.write, plain.write)
    assert not torch.allclose(other_ends.read, plain.read, rtol=0.01)


def test_rows_are_chosen_on_request():
    keys, text = with_text()
    donor, recipient = both(len(keys), keys=keys)
    adapter = adapter_of(4)
    by_ends = paste(adapter, donor, recipient, write_rows="end")
    assert same_tensors(by_ends, paste(adapter, changed(donor, text), changed(recipient, text), write_rows="end"))
    ends_only = profile_of({layer: rows[:40] for layer, rows in donor.activations.items()}, DONOR)
    assert same_tensors(by_ends, paste(adapter, ends_only, recipient))  # no text rows to share: ends serve both
    with pytest.raises(InputError, match=r"0 shared text rows .* expected at least 2; profile with text="):
        paste(adapter, ends_only, recipient, write_rows="text")


# -- prompts kept from the fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", FIT)
def test_held_out_prompts_are_never_seen_by_a_fit(fit):
    keys, text = with_text()
    donor, recipient = both(len(keys), keys=keys)
    adapter = adapter_of(4, 5)
    expected = paste(adapter, donor, recipient, fit=fit, holdout=0.2)
    unseen = held_out_prompts(keys[:, 0], 0.2)
    assert unseen[text].any()
    assert unseen[~text].any()
    got = paste(adapter, changed(donor, unseen), changed(recipient, unseen), fit=fit, holdout=0.2)
    assert same_tensors(got, expected)
    seen = np.flatnonzero(~unseen & ~text)[:1]
    one_row = np.isin(np.arange(len(keys)), seen)
    assert not same_tensors(paste(adapter, donor, changed(recipient, one_row), fit=fit, holdout=0.2), expected)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_held_out_prompts_are_the_share_asked_for_and_grow_with_it(share):
    marked = held_out_prompts(np.arange(2000), share)
    assert marked.mean() == pytest.approx(share, abs=0.01)
    assert (marked <= held_out_prompts(np.arange(2000), share + 0.1)).all()
    # Spread over the set, not one end of it.
    assert held_out_prompts(np.arange(1000), share).mean() == pytest.approx(share, abs=0.02)
    # By prompt, whatever rows are asked about.
    assert (held_out_prompts(np.repeat(np.arange(50), 3)[::-1], share) == marked[:50].repeat(3)[::-1]).all()


# -- fidelity ---------------------------------------------------------------------------------------------------------


def test_fidelity_is_near_one_where_the_streams_are_related():
    donor, recipient = both(300)
    (told,) = fidelity(paste(adapter_of(4), donor, recipient), donor, recipient)
    assert (told.donor, told.recipient, told.n) == (4, 6, int(held_out_prompts(np.arange(300), 0.1).sum()))
    for name in ("read_r2", "write_r2", "read_cosine", "write_cosine", "adapter_read_r2", "adapter_write_r2"):
        assert 0.98 < getattr(told, name) <= 1.0, name
    assert 0 <= told.cycle_error < 0.02


def test_fidelity_is_near_zero_where_they_are_not():
    donor, _ = both(300)
    # Of the same prompts, and nothing in common.
    alien = profile_of({layer: normal(300, D_RECIPIENT, seed=900 + layer) for layer in range(9)}, RECIPIENT)
    (told,) = fidelity(paste(adapter_of(4), donor, alien), donor, alien)
    for name in ("read_r2", "write_r2", "adapter_read_r2", "adapter_write_r2"):
        assert -0.35 < getattr(told, name) < 0.1, name
    assert abs(told.read_cosine) < 0.3
    assert told.cycle_error > 0.9


def test_shuffled_pairs_destroy_fidelity():
    donor, recipient = both(300)
    adapter = adapter_of(4)
    shuffled = paste(adapter, donor, recipient, shuffle=0)
    (plain,) = fidelity(paste(adapter, donor, recipient), donor, recipient)
    (told,) = fidelity(shuffled, donor, recipient)
    assert plain.read_r2 > 0.98
    assert plain.write_r2 > 0.98
    assert max(told.read_r2, told.write_r2, told.adapter_read_r2, told.adapter_write_r2) < 0.1
    assert same_tensors(shuffled, paste(adapter, donor, recipient, shuffle=0))
    assert not same_tensors(shuffled, paste(adapter, donor, recipient, shuffle=1))


def test_fidelity_measures_held_out_rows_not_fitted_ones():
    """Least squares through as many rows as dimensions fits its own rows exactly and others not at all."""
    donor, recipient = both(17, noise=1.0)
    (told,) = fidelity(paste(adapter_of(4), donor, recipient, fit=Pinv(exact=True), holdout=0.2), donor, recipient)
    fitted = ~held_out_prompts(np.arange(17), 0.2)
    x, y = recipient.layer(6)[torch.from_numpy(fitted)], donor.layer(4)[torch.from_numpy(fitted)]
    assert len(x) <= D_RECIPIENT
    assert r2(Pinv(exact=True)(x, y)(x.double()), y.double()) > 0.999
    assert told.read_r2 < 0.5


@pytest.mark.parametrize("fit", FIT)
def test_fidelity_survives_the_file_and_needs_the_donor_adapter_then(fit):
    donor, recipient = both()
    adapter = adapter_of(4, 5)
    pasted = paste(adapter, donor, recipient, fit=fit, shuffle=3)
    loaded = replace(pasted, donor=None, provenance=json.loads(json.dumps(pasted.provenance)))
    assert fidelity(loaded, donor, recipient, donor_adapter=adapter) == fidelity(pasted, donor, recipient)
    with pytest.raises(InputError, match="donor_adapter="):
        fidelity(loaded, donor, recipient)


def test_fidelity_leaves_out_dimensions_that_do_not_vary():
    donor, recipient = both(300)
    (plain,) = fidelity(paste(adapter_of(4), donor, recipient), donor, recipient)
    for profile in (donor, recipient):
        for rows in profile.activations.values():
            rows[:, 3], rows[:, 5] = 0.0, 1234.567
    (told,) = fidelity(paste(adapter_of(4), donor, recipient), donor, recipient)
    for name in ("read_r2", "write_r2", "read_cosine", "write_cosine", "cycle_error"):
        assert getattr(told, name) == pytest.approx(getattr(plain, name), abs=0.02), name


def test_r2_and_cosine_of_known_predictions():
    true = normal(50, 4) * torch.tensor([1.0, 10.0, 100.0, 1e4]) + 7
    mean, std = true.mean(0), true.std(0, correction=0)
    assert r2(true, true) == 1.0
    assert r2(mean.expand_as(true), true) == pytest.approx(0.0)
    assert r2(true + 0.5 * std, true) == pytest.approx(0.75)
    assert r2(mean - (true - mean), true) == pytest.approx(-3.0)
    assert cosine(mean + 5 * (true - mean), true) == pytest.approx(1.0)
    assert cosine(mean - (true - mean), true) == pytest.approx(-1.0)


# -- random control ---------------------------------------------------------------------------------------------------


def test_random_control_adds_as_much_on_every_state_in_other_directions():
    donor, recipient = both()
    adapter = adapter_of(2, 4, 5)
    pasted = paste(adapter, donor, recipient, match=explicit({2: 6, 4: 6, 5: 7}))
    assert len(pasted.interventions[6]) == 2  # which partly cancel or add up on each state
    control = random_like(pasted, 0)
    h = 3 * normal(50, D_RECIPIENT, seed=4)
    for layer in (6, 7):
        a, b = delta(pasted, layer, h), delta(control, layer, h)
        torch.testing.assert_close(b.norm(dim=1), a.norm(dim=1), rtol=1e-5, atol=1e-6)
        assert abs(float(torch.nn.functional.cosine_similarity(a, b).mean())) < 0.8
    assert same_tensors(control, random_like(pasted, 0))
    assert not same_tensors(control, random_like(pasted, 1))
    assert control.interventions[6][0].write is not pasted.interventions[6][0].write


def test_random_control_has_no_direction_it_prefers():
    one = Adapter({0: steering_vector(torch.ones(D_DONOR))}, DONOR, "v")
    drawn = torch.stack([random_like(one, seed).interventions[0][0].write[0] for seed in range(400)])
    torch.testing.assert_close(drawn.norm(dim=1), torch.full((400,), D_DONOR**0.5))
    assert drawn.mean(0).norm() < 0.1 * D_DONOR**0.5
    assert len({tuple(row) for row in drawn.tolist()}) == 400


def test_random_control_of_more_directions_than_dimensions():
    one = Adapter({0: tuple(intervention(seed, rank=8) for seed in (0, 30))}, DONOR, "wide")
    h = normal(20, D_DONOR, seed=4)
    a, b = delta(one, 0, h), delta(random_like(one, 0), 0, h)
    torch.testing.assert_close(b.norm(dim=1), a.norm(dim=1), rtol=1e-5, atol=1e-6)


# -- the store --------------------------------------------------------------------------------------------------------


@pytest.fixture
def factorisations(monkeypatch) -> list[str]:
    seen: list[str] = []
    for cls in (Factor, Cholesky):
        original = cls.of.__func__

        def counted(kind, *args, original=original):
            seen.append(kind.__name__)
            return original(kind, *args)

        monkeypatch.setattr(cls, "of", classmethod(counted))
    return seen


@pytest.mark.parametrize("fit", [Ridge(strength=1.0), Pinv(exact=True)], ids=["ridge", "pinv-exact"])
def test_a_second_adapter_over_the_same_profiles_factorises_nothing(fit, factorisations):
    donor, recipient = both()
    store = FactorStore()
    first = paste(adapter_of(4, 5), donor, recipient, fit=fit, store=store)
    assert len(factorisations) == 4  # two layers, each way
    other = adapter_of(4, 5).scaled(3.0)
    second = paste(other, donor, recipient, fit=fit, store=store)
    assert len(factorisations) == 4
    assert same_tensors(first, paste(adapter_of(4, 5), donor, recipient, fit=fit))
    assert same_tensors(second, paste(other, donor, recipient, fit=fit))


def test_donor_layers_that_meet_share_the_recipient_layer_s_factorisation(factorisations, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # two threads at once may both make it
    donor, recipient = both()
    paste(
        adapter_of(2, 4),
        donor,
        recipient,
        fit=Ridge(strength=1.0),
        match=explicit({2: 7, 4: 7}),
        store=FactorStore(),
    )
    assert len(factorisations) == 3


def test_one_store_serves_different_pastes_without_mixing_them_up():
    """Controls, settings, directions and other profiles of the same names, all over one store."""
    donor, recipient = both()
    alien = replace(recipient, activations={k: rows.flip(0) for k, rows in recipient.activations.items()})
    adapter, other = adapter_of(4), adapter_of(6, ref=RECIPIENT)
    back = {"match": explicit({6: 4}), "layers": "all_layers"}
    pastes = [
        (adapter, donor, recipient, {}),
        (adapter, donor, recipient, {"shuffle": 0}),
        (adapter, donor, recipient, {"shuffle": 1}),
        (adapter, donor, recipient, {"holdout": 0.3}),
        (adapter, donor, recipient, {"fit": Ridge(select="gcv")}),
        (adapter, donor, recipient, {"fit": Ridge(standardise=False)}),
        (adapter, donor, recipient, {"fit": ReducedRank(2)}),
        (adapter, donor, recipient, {"fit": Pinv()}),
        (adapter, donor, recipient, {"fit": Pinv(exact=True)}),
        (adapter, donor, recipient, {"fit": FITTERS["affine"]()}),
        (adapter, donor, alien, {}),
        (other, recipient, donor, back),
        (adapter, donor, donor, {"layers": [4]}),
    ]
    store = FactorStore()
    for one, a, b, options in pastes:
        kept = paste(one, a, b, store=store, **options)
        assert same_tensors(kept, paste(one, a, b, **options)), options


# -- what is refused --------------------------------------------------------------------------------------------------


def test_profiles_of_different_prompts_are_refused():
    donor, recipient = both()
    with pytest.raises(MismatchError, match=r"of different prompts \(p and q\); profile both models on the same"):
        paste(adapter_of(4), donor, replace(recipient, prompts="q"))


@pytest.mark.parametrize(
    "ref",
    [ModelRef("donor", "d2", D_DONOR, 6), ModelRef("donor", "d1", D_DONOR, 7), ModelRef("other", "", D_DONOR, 6)],
    ids=["revision", "depth", "name"],
)
def test_adapters_of_another_model_are_refused(ref):
    donor, recipient = both()
    with pytest.raises(MismatchError, match="adapter test: made for"):
        paste(replace(adapter_of(4), model=ref), donor, recipient)


def test_adapters_of_another_width_are_refused():
    donor, recipient = both()
    with pytest.raises(MismatchError, match="another width"):
        paste(adapter_of(4), recipient, donor)


def test_too_few_shared_rows_are_refused():
    donor, recipient = both()
    apart = replace(recipient, keys=recipient.keys + np.array([[N - 1, 0]]))  # one prompt in common
    with pytest.raises(InputError, match=r"1 shared end rows between the two profiles, expected at least 2"):
        paste(adapter_of(4), donor, apart)
    donor, recipient = both(3)
    with pytest.raises(InputError, match="2 rows or more"):
        paste(adapter_of(4), donor, recipient, holdout=0.99)


def test_a_choice_of_layers_that_no_donor_layer_goes_to_is_refused():
    donor, recipient = both()
    with pytest.raises(InputError, match=r"acts on donor layers \[0, 4\]; none is matched .* layers \[5, 7\]"):
        paste(adapter_of(0, 4), donor, recipient, layers=[7, 5])
    with pytest.raises(InputError, match=r"\[9\]: expected some among 0 .. 8"):
        paste(adapter_of(0, 4), donor, recipient, layers=[9])


@pytest.mark.parametrize("holdout", [-0.1, 1.0, 7, float("nan")])
def test_a_holdout_that_is_no_share_is_refused(holdout):
    donor, recipient = both()
    with pytest.raises(InputError, match="expected a share from 0"):
        paste(adapter_of(4), donor, recipient, holdout=holdout)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    donor, recipient = both()
    with pytest.raises(InputError, match="expected a finite number"):
        paste(adapter_of(4), donor, recipient, scale=scale)


@pytest.mark.parametrize("fit", FIT)
def test_profiles_that_are_not_finite_are_refused(fit):
    donor, recipient = both()
    recipient.layer(6)[7, 2] = float("inf")
    with pytest.raises(InputError, match="NaN or infinity"):
        paste(adapter_of(4), donor, recipient, fit=fit)


def test_a_layer_that_the_profile_does_not_hold_is_refused():
    donor, recipient = both()
    partial = replace(recipient, activations={layer: recipient.layer(layer) for layer in (0, 8)})
    with pytest.raises(InputError, match=r"recipient holds layers \[0, 8\], not 6"):
        paste(adapter_of(4), donor, partial)


def test_fidelity_of_what_was_not_pasted_is_refused():
    donor, recipient = both()
    with pytest.raises(InputError, match="of a pasted adapter"):
        fidelity(adapter_of(4), donor, recipient)
    with pytest.raises(InputError, match="holdout=0: no prompts are left"):
        fidelity(paste(adapter_of(4), donor, recipient, holdout=0), donor, recipient)
    donor, recipient = both(4)
    with pytest.raises(InputError, match=r"keeps 1 rows from the fit, expected at least 2"):
        fidelity(paste(adapter_of(4), donor, recipient), donor, recipient)


def test_fidelity_over_other_profiles_is_refused():
    donor, recipient = both()
    pasted = paste(adapter_of(4), donor, recipient)
    with pytest.raises(MismatchError, match="made for donor"):
        fidelity(pasted, recipient, donor)
    with pytest.raises(MismatchError, match="pasted adapter test: made for recipient"):
        fidelity(pasted, donor, donor)
    with pytest.raises(MismatchError, match="prompts p, got q"):
        fidelity(pasted, replace(donor, prompts="q"), replace(recipient, prompts="q"))
