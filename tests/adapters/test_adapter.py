"""The one form act(h Rᵀ + b) W, and every kind against its own formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from commandv.adapters.adapter import ACTIVATIONS, Adapter, Intervention
from commandv.adapters.kinds import ablation, consreft, direft, lobireft, loreft, nodireft, noreft, steering_vector
from commandv.errors import InputError, MismatchError
from commandv.models.identity import ModelRef
from commandv.positions import EVERYWHERE, LAST, Positions

D, RANK = 12, 3
FORMULAS = {"linear": lambda x: x, "relu": torch.relu, "gelu": gelu, "silu": silu, "tanh": torch.tanh}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


H = 3 * normal(2, 5, D, seed=99)
W, B, S, P, C = normal(RANK, D, seed=1), normal(RANK, seed=2), normal(RANK, D, seed=3), normal(RANK, D), normal(RANK)
Q = torch.linalg.qr(normal(D, RANK, seed=4)).Q
ROUGH = Q.bfloat16().float()  # orthonormal up to the rounding of a checkpoint


def total(interventions: tuple[Intervention, ...], h: Tensor = H) -> Tensor:
    return sum(one.delta(h) for one in interventions)


def adapter(*interventions: Intervention, layer: int = 1, ref: ModelRef = ModelRef("m", "r", D, 4)) -> Adapter:
    return Adapter({layer: interventions}, ref, "test")


# -- the kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", [Q, ROUGH], ids=["exact", "rounded"])
@pytest.mark.parametrize("name", FORMULAS)
def test_loreft(name, rotation):
    expected = (FORMULAS[name](H @ W.T + B) - H @ rotation) @ rotation.T
    torch.testing.assert_close(total(loreft(W, B, rotation, name)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMULAS)
def test_noreft_uses_the_bias_of_its_projection(name):
    expected = (FORMULAS[name](H @ S.T + B) - (H @ P.T + C)) @ P
    torch.testing.assert_close(total(noreft(S, B, P, C, name)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMULAS)
def test_nodireft(name):
    torch.testing.assert_close(total(nodireft(S, B, P, name)), FORMULAS[name](H @ S.T + B) @ P, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMULAS)
def test_direft(name):
    torch.testing.assert_close(total(direft(W, B, Q, name)), FORMULAS[name](H @ W.T + B) @ Q.T, rtol=1e-4, atol=1e-4)


def test_consreft_sets_the_subspace_to_its_constant():
    torch.testing.assert_close(total(consreft(B, Q)), (B - H @ Q) @ Q.T, rtol=1e-4, atol=1e-4)
    changed = H + total(consreft(B, Q))
    torch.testing.assert_close(changed @ Q, B.expand(2, 5, RANK), rtol=1e-4, atol=1e-4)


def test_lobireft_adds_a_constant():
    torch.testing.assert_close(total(lobireft(B, Q)), (B @ Q.T).expand_as(H), rtol=1e-4, atol=1e-5)


def test_formulas_here_cover_every_activation():
    assert set(FORMULAS) == set(ACTIVATIONS)


def test_steering_vector_adds_itself_everywhere():
    v = normal(D, seed=7)
    torch.testing.assert_close(H + total(steering_vector(v, 2.5)), H + 2.5 * v)


@pytest.mark.parametrize("n", [1, 3])
def test_ablation_removes_the_span_and_nothing_else(n):
    directions = 5 * normal(n, D, seed=8)
    one = ablation(directions)
    changed = H + total(one)
    torch.testing.assert_close(changed @ directions.T, torch.zeros(2, 5, n), rtol=0, atol=1e-4)
    torch.testing.assert_close(changed + total(one, changed), changed, rtol=1e-4, atol=1e-5)  # idempotent
    orthogonal = H - H @ torch.linalg.pinv(directions) @ directions
    torch.testing.assert_close(changed, orthogonal, rtol=1e-4, atol=1e-4)


def test_ablation_takes_one_bare_direction():
    torch.testing.assert_close(total(ablation(W[0])), total(ablation(W[:1])))


def test_ablation_of_dependent_directions_leaves_the_rest_alone():
    v, w = normal(2, D, seed=8)
    repeated = torch.stack([v, -3 * v, w, v + w, torch.zeros(D)])
    assert ablation(repeated)[0].rank == 2
    torch.testing.assert_close(total(ablation(repeated)), total(ablation(torch.stack([v, w]))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.zeros(D), torch.full((2, D), float("nan"))], ids=["zero", "nan"])
def test_ablation_of_nothing_is_refused(bad):
    with pytest.raises(InputError, match="nothing to ablate"):
        ablation(bad)


# -- the form ---------------------------------------------------------------------------------------------------------


def test_linear_adapters_have_a_gauge():
    m = torch.eye(RANK) + 0.4 * normal(RANK, RANK, seed=11)
    same = Intervention(m @ W, m @ B, torch.linalg.inv(m).T @ P)
    torch.testing.assert_close(same.delta(H), Intervention(W, B, P).delta(H), rtol=1e-3, atol=1e-3)
    bent = Intervention(m @ W, m @ B, torch.linalg.inv(m).T @ P, "relu")
    assert (bent.delta(H) - Intervention(W, B, P, "relu").delta(H)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("read", "bias", "write"),
    [(W, B, P[:2]), (W, B[:2], P), (W[0], B, P), (W[:, :5], B, P), (W, B[:, None], P), (W, B, P[None])],
)
def test_shapes_that_do_not_fit_are_refused(read, bias, write):
    with pytest.raises(InputError, match=r"expected \[rank, d_model\], \[rank\], \[rank, d_model\]"):
        Intervention(read, bias, write)


@pytest.mark.parametrize("name", ["read", "bias", "write"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(name, value):
    tensors = {"read": W.clone(), "bias": B.clone(), "write": P.clone()}
    tensors[name].view(-1)[1] = value
    with pytest.raises(InputError, match=f"{name} holds NaN or infinity"):
        Intervention(**tensors)


def test_unknown_activation_is_refused():
    with pytest.raises(InputError, match="'swish': expected one of linear, relu"):
        Intervention(W, B, P, "swish")
    with pytest.raises(InputError, match="'swish'"):
        loreft(W, B, Q, "swish")


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_adapter_refuses_what_its_model_cannot_have():
    one = Intervention(W, B, P)
    with pytest.raises(InputError, match="without interventions"):
        Adapter({}, ModelRef())
    with pytest.raises(InputError, match="without interventions"):
        Adapter({0: ()}, ModelRef())
    with pytest.raises(InputError, match=r"width \[12\] for d_model 13"):
        adapter(one, ref=ModelRef(d_model=13))
    with pytest.raises(InputError, match=r"width \[5, 12\]"):
        adapter(one, Intervention(W[:, :5], B, P[:, :5]), ref=ModelRef())
    for layer in (-1, 4):
        with pytest.raises(InputError, match=f"layer {layer} is outside 0 .. 3"):
            adapter(one, layer=layer)


def test_scaled_multiplies_the_delta_of_any_activation():
    for name in ACTIVATIONS:
        one = adapter(Intervention(W, B, P, name))
        torch.testing.assert_close(total(one.scaled(-2.5).interventions[1]), -2.5 * total(one.interventions[1]))


def test_at_moves_the_positions_and_nothing_else():
    one = adapter(Intervention(W, B, P), Intervention(S, B, P, "relu", LAST))
    assert one.prefill_only
    moved = one.at(EVERYWHERE)
    assert [part.positions for part in moved.interventions[1]] == [EVERYWHERE] * 2
    assert not moved.prefill_only
    assert not one.at(Positions(last=1, generated=1)).prefill_only
    torch.testing.assert_close(total(moved.interventions[1]), total(one.interventions[1]), rtol=0, atol=0)


def test_on_layers_keeps_the_layers_named():
    one = Intervention(W, B, P)
    many = Adapter({3: (one,), 0: (one,), 2: (one, one)}, ModelRef("m", "r", D, 4))
    assert many.layers == [0, 2, 3]
    assert many.n_parameters == 4 * RANK * (2 * D + 1)
    assert many.on_layers([2, 1]).layers == [2]
    with pytest.raises(InputError, match=r"acts on layers \[0, 2, 3\], none of them among \[1\]"):
        many.on_layers([1])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ModelRef("m", "r", D + 1, 4, "t"), "another width"),
        (ModelRef("m", "r", D, 5, "t"), "another depth"),
        (ModelRef("m", "r2", D, 4, "t"), "revision"),
        (ModelRef("m", "r", D, 4, "t2"), "prompt format"),
        (ModelRef("m2", "", D, 4, "t"), "made for m, got m2"),
    ],
)
def test_adapter_of_another_model_is_told_apart(other, message):
    with pytest.raises(MismatchError, match=message):
        ModelRef("m", "r", D, 4, "t").require(other, "adapter")


def test_fields_unknown_on_one_side_are_not_compared():
    ModelRef("m", "r", D, 4, "t").require(ModelRef(), "adapter")
    ModelRef().require(ModelRef("m", "r", D, 4, "t"), "adapter")
    ModelRef("m", "r", D, 4).require(ModelRef("the-same", "r", D, 4), "adapter")
