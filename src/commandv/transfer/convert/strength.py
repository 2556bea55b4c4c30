"""The strength of a ridge, chosen in closed form from one tridiagonal factorisation.

With an intercept the hat matrix is H = 11ᵀ/n + X (XᵀX + lambda I)⁻¹ Xᵀ for centred X [n, d]. As K = Q T Qᵀ (see
`factor`), I - H = lambda Q (T + lambda I)⁻¹ Qᵀ - 11ᵀ/n in the dual case, K = X Xᵀ, and
I - H = I - X Q (T + lambda I)⁻¹ Qᵀ Xᵀ - 11ᵀ/n in the primal one, K = Xᵀ X.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from commandv.transfer.convert.factor import Factor, Regularised
from commandv.transfer.convert.rows import Rows

# Strengths tried, relative to the mean eigenvalue; nearly exact relations want the weak ones.
STRENGTHS = 10.0 ** np.concatenate([np.arange(-6.0, -3.0, 0.5), np.arange(-3.0, 2.76, 0.25)])
FLOAT32_FLOOR = 1e-4  # of the greatest eigenvalue: a strength above it forgives float32 rounding
# Rows that are left out to choose a strength, about. On 72 synthetic pairs (1,000 to 3,000 rows, spectra falling by
# i^-.35 to i^-1.3) 512 chose within a step of what all rows chose on 70, at .7 % more error at most.
LOO_ROWS = 512
SKETCH = 24  # random projections of the targets on which the strength is chosen
BLOCK_BYTES = 2 << 20  # of the recurrence of `_quadratic_blocks`


def choose_strength(
    factorise: Callable[[type], Factor], targets: Rows, groups: np.ndarray, method: Literal["loo", "gcv"]
) -> float:
    """Choose the strength among `STRENGTHS`, on a sketch of the targets.

    Strengths that drown in the rounding of float32 are left out at first; if the weakest of the others seems best, all
    are tried again in float64.

    Args:
        factorise: gives the factorisation of the predictors in float32 or float64.
        targets: [n, d_y], centred.
        groups: prompt number of each row, int64 [n].
        method: `"loo"` or `"gcv"`, see `loo` and `gcv`.

    Returns:
        The strength, relative to the mean eigenvalue.
    """

    def best(dtype: type, strengths: np.ndarray) -> float:
        factor, t = factorise(dtype), sketch(targets, dtype)
        scores = loo(factor, t, strengths, groups=groups) if method == "loo" else gcv(factor, t, strengths)
        return float(strengths[np.argmin(scores)])

    factor = factorise(np.float32)
    first = int(np.searchsorted(STRENGTHS, FLOAT32_FLOOR * factor.bound / factor.unit))
    chosen = best(np.float32, STRENGTHS[first:])
    if first and chosen == STRENGTHS[first]:
        chosen = best(np.float64, STRENGTHS)
    return chosen


def gcv(factor: Factor, targets: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Return ||(I - H) T||² / tr(I - H)² for every strength [s]: generalised cross-validation.

    Source: Golub, Heath and Wahba 1979. The norm is that of lambda (T + lambda I)⁻¹ Qᵀ T in the dual case; in the
    primal one, with c = Qᵀ Xᵀ T and v = (T + lambda I)⁻¹ c, its square is ||T||² - c·v - lambda ||v||².

    Args:
        factor: of the predictors, centred.
        targets: T, [n, t], centred.
        strengths: relative to the mean eigenvalue, [s].
    """
    rows = factor.rows
    rotated = factor.rotate(targets if rows.dual else rows.transposed_times(targets))
    values = factor.values[1:] if rows.dual else factor.values  # the least is 0 in the dual case, but for rounding
    energy = float((targets.astype(np.float64) ** 2).sum())
    scores = np.empty(len(strengths))
    for i, strength in enumerate(strengths):
        ridge = factor.ridge(strength)
        v = ridge.solve(rotated).astype(np.float64)
        square = ridge.penalty * float((v * v).sum())
        left = ridge.penalty * square if rows.dual else max(0.0, energy - float((rotated * v).sum()) - square)
        trace = rows.n - 1 - float((values / (values + ridge.penalty)).sum())
        scores[i] = left / max(trace, 1e-9) ** 2
    return scores


def loo(factor: Factor, targets: np.ndarray, strengths: np.ndarray, *, groups: np.ndarray) -> np.ndarray:
    """Return the sum of squared leave-one-out errors for every strength [s], on a sample of the rows.

    Source: PRESS (Allen 1974). Rows of one prompt are left out together, or the strength would be chosen on
    near-copies: the residuals r_g of a prompt become (I - H_gg)⁻¹ r_g. The sum is over `LOO_ROWS` rows, about, all
    rows of prompts drawn at random once and for all strengths, so that up to a factor it is an unbiased estimate of
    the sum over all prompts; it is that sum when there are no more rows.

    Args:
        factor: of the predictors, centred.
        targets: T, [n, t], centred.
        strengths: relative to the mean eigenvalue, [s].
        groups: prompt number of each row, int64 [n].
    """
    rows, dtype = factor.rows, factor.dtype
    index, sizes = _sample(groups)
    if rows.dual:
        own, right = np.zeros((rows.n, len(index)), dtype), np.concatenate([targets, np.ones((rows.n, 1), dtype)], 1)
        own[index, np.arange(len(index))] = 1
    else:
        own, right = rows.at(index).dense(dtype.type).T, rows.transposed_times(targets)
    # Qᵀ W, the sampled rows of I (dual) or X (primal) as columns, and what `_residuals` needs of the targets.
    own, rotated = np.split(factor.rotate(np.concatenate([own, right], 1)), [len(index)], 1)
    own = np.ascontiguousarray(own)
    ridges = [factor.ridge(strength) for strength in strengths]
    residual, constant = _residuals(rows, targets[index], own, rotated, ridges)
    penalty = np.array([ridge.penalty for ridge in ridges], dtype)[:, None, None, None]
    total, start = np.zeros(len(ridges)), 0
    for size, part in _quadratic_blocks(own, ridges, sizes):
        here, identity = slice(start, start + part.shape[1] * size), np.eye(size, dtype=dtype)
        side = constant[:, here].reshape(*part.shape[:3], 1)
        remains = (penalty * part if rows.dual else identity - part) - side * side.swapaxes(2, 3)
        remains += 8 * np.finfo(dtype).eps * identity  # what rounding may have made singular
        left_out = np.linalg.solve(remains, residual[:, here].reshape(*part.shape[:3], -1))
        total += (left_out.astype(np.float64) ** 2).sum((1, 2, 3))
        start = here.stop
    return total


def _residuals(
    rows: Rows, targets: np.ndarray, own: np.ndarray, rotated: np.ndarray, ridges: Sequence[Regularised]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sampled rows of (I - H) T [s, m, t], and c [s, m, 1] such that c cᵀ is 11ᵀ/n of these rows.

    In the dual case c cᵀ = lambda M 11ᵀ M / 1ᵀ M 1 with M = (K + lambda I)⁻¹, which is the same but for rounding:
    K 1 = 0 holds up to an error that is not small beside lambda, and what it does to M must cancel.

    Args:
        rows: X, all n rows.
        targets: the m sampled rows of T, [m, t].
        own: Qᵀ of the sampled rows of I (dual) or X (primal), [k, m].
        rotated: Qᵀ [T, 1] [k, t + 1] (dual) or Qᵀ Xᵀ T [k, t] (primal).
        ridges: T + lambda I for s strengths.
    """
    (m, t), dtype = targets.shape, targets.dtype
    residual, sides = np.empty((len(ridges), m, t), dtype), np.full((len(ridges), m, 1), rows.n**-0.5, dtype)
    for i, ridge in enumerate(ridges):
        solved = ridge.solve(rotated)
        fitted = own.T @ solved
        if rows.dual:  # fitted is the rows of M [T, 1], and this is 1ᵀ M [T, 1]
            sums = rotated[:, -1] @ solved
            residual[i] = ridge.penalty * (fitted[:, :-1] - fitted[:, -1:] * (sums[:-1] / sums[-1]))
            sides[i] = fitted[:, -1:] * np.sqrt(ridge.penalty / sums[-1])
        else:
            residual[i] = targets - fitted
    return residual, sides


def _sample(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of groups drawn at random, group after group, and the groups' sizes, ascending."""
    names, of_row, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    count = max(1, round(len(names) * min(1.0, LOO_ROWS / len(groups))))
    drawn = np.random.default_rng(0).permutation(len(names))[:count]
    drawn = drawn[np.argsort(sizes[drawn], kind="stable")]
    place = np.full(len(names), len(names))
    place[drawn] = np.arange(count)
    return np.argsort(place[of_row], kind="stable")[: sizes[drawn].sum()], sizes[drawn]


def _quadratic_blocks(
    own: np.ndarray, ridges: Sequence[Regularised], sizes: np.ndarray
) -> list[tuple[int, np.ndarray]]:
    """Return the diagonal blocks of Wᵀ (T + lambda I)⁻¹ W for every strength.

    As T + lambda I = L D Lᵀ they are sums over the rows of z = D^-1/2 L⁻¹ W, which one recurrence gives for all
    columns and strengths together: half of what solving would take, and a vector operation instead of a serial one.

    Args:
        own: W, [k, m].
        ridges: T + lambda I for s strengths.
        sizes: of the blocks, ascending, m together.

    Returns:
        For every size: the size g and its blocks [s, number of blocks, g, g].
    """
    (k, m), s = own.shape, len(ridges)
    root = np.sqrt(np.stack([ridge.pivots for ridge in ridges], 1))[..., None]  # [k, s, 1]
    lower = np.zeros_like(root)
    lower[1:] = np.stack([-ridge.lower for ridge in ridges], 1)[..., None] * root[:-1] / root[1:]
    scale = 1 / root
    unique, counts = np.unique(sizes, return_counts=True)
    blocks = [np.zeros((s, count, size, size), own.dtype) for size, count in zip(unique, counts, strict=True)]
    step = min(k, max(1, BLOCK_BYTES // (s * m * own.itemsize)))
    z, last = np.empty((s, step, m), own.dtype), np.zeros((s, m), own.dtype)
    for a in range(0, k, step):
        part = z[:, : min(step, k - a)]
        for i in range(part.shape[1]):
            row = part[:, i]
            np.multiply(last, lower[a + i], out=row)
            row += scale[a + i] * own[a + i]
            last = row
        last = last.copy()  # the next block takes the memory of this one
        start = 0
        for block in blocks:
            count, size = block.shape[1:3]
            columns = part[:, :, start : start + count * size]
            if size == 1:
                block[..., 0, 0] += np.einsum("skm,skm->sm", columns, columns)
            else:
                side = columns.reshape(s, -1, count, size).transpose(0, 2, 3, 1)
                block += side @ side.swapaxes(2, 3)
            start += count * size
    return list(zip(unique.tolist(), blocks, strict=True))


def sketch(rows: Rows, dtype: type) -> np.ndarray:
    """Project rows [n, d] on `SKETCH` fixed random directions, so that sums of squares keep their proportions."""
    return rows.times(_directions(rows.d).astype(dtype))


@functools.cache
def _directions(d: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((d, SKETCH)) / np.sqrt(SKETCH)
