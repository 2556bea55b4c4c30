"""Reading a model's states at chosen tokens, in one streamed pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from commandv.arguments import checked
from commandv.errors import InputError
from commandv.models.encoding import Encoded, encode, pad_replies
from commandv.models.generation import batches
from commandv.models.lm import LM
from commandv.positions import LAST, Positions
from commandv.profiles.profile import END, Profile
from commandv.profiles.work import read_rows
from commandv.progress import track
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering.contrast import Contrast

Triggers = str | tuple[str, str] | None


@checked
def states(
    lm: LM, prompts: PromptSet, positions: Positions, *, batch_size: int = 16
) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
    """Yield the residual stream at chosen tokens of prompts and their replies, batch after batch, of every layer.

    Args:
        lm: the model, with whatever is attached.
        prompts: read in the model's own format; a reply follows its prompt at once.
        positions: which tokens; `gN` are the first N of the reply.
        batch_size: sequences per forward pass.

    Yields:
        (the number of the prompt that each row belongs to, layer -> bfloat16 [rows, d_model]).
    """
    return _states(lm, [encode(lm, one.text, one.response) for one in prompts], positions, batch_size)


def _states(
    lm: LM, encoded: Sequence[Encoded], positions: Positions, batch_size: int, *, skip_first: bool = False
) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
    """Yield what `states` yields, of token ids; with `skip_first`, `all` is without the first token."""
    alike = [one.n_prompt for one in encoded] if lm.recurrent else None  # prompts are padded at their left
    for members in batches([len(one.ids) for one in encoded], batch_size, alike=alike):
        batch, n_prompt = pad_replies(lm, [encoded[i] for i in members])
        real = batch.attention_mask.bool()
        chosen = positions.select(real[:, :n_prompt], 0, real.shape[1]) & real
        if skip_first and positions.everywhere:
            chosen &= (real.cumsum(1) > 1) | (real.sum(1, keepdim=True) == 1)
        rows, columns = chosen.nonzero(as_tuple=True)
        if len(rows):
            yield [members[row] for row in rows.tolist()], read_rows(lm, batch, (rows, columns))


@checked
def mean_states(lm: LM, prompts: PromptSet, positions: Positions, *, batch_size: int = 16) -> Tensor:
    """Return the mean over all chosen tokens of all prompts of the state there, float64 [n_layers, d_model].

    Raises:
        InputError: no token is at these positions (`gN` of prompts without replies).
    """
    total = torch.zeros(lm.n_layers, lm.d_model, dtype=torch.float64)
    count = 0
    for owners, layers in states(lm, prompts, positions, batch_size=batch_size):
        count += len(owners)
        for layer, rows in layers.items():
            total[layer] += rows.double().sum(0)
    if not count:
        raise InputError(f"{prompts.name}: no token at positions {positions}; `gN` needs prompts with replies")
    return total / count


@checked
def prompt_states(
    lm: LM, prompts: PromptSet, positions: Positions, *, trigger: str | None = None, batch_size: int = 16
) -> Tensor:
    """Return each prompt's state, the mean over its chosen tokens, float32 [n_layers, prompts, d_model].

    Args:
        lm: the model, with whatever is attached.
        prompts: prompts, with replies for `gN`.
        positions: which tokens; `all` is without the first, as in `read_contrast`.
        trigger: read at the last token of this string's last occurrence in each prompt instead.
        batch_size: sequences per forward pass.

    Raises:
        InputError: positions outside a prompt, or a trigger that is not there.
    """
    found = torch.empty(lm.n_layers, len(prompts), lm.d_model)
    encoded = _encoded(lm, prompts, positions, trigger)
    for owners, means, _ in _prompt_means(lm, encoded, LAST if trigger else positions, batch_size):
        found[:, owners] = means.float()
    return found


# -- what one pass over a contrast finds --------------------------------------------------------------------------


class Stream(NamedTuple):
    """What one layer's residual stream is like where a direction was read.

    Attributes:
        norm: typical norm of a state: the geometric mean, which the giant states of a few first tokens hardly move.
        mean: mean state, float64 [d_model].
        low: mean state of the negative side, float64 [d_model].
        high: mean state of the positive side, float64 [d_model].
    """

    norm: float
    mean: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """The states of a contrast's two sides, per layer; a prompt's state is the mean over its chosen tokens.

    Attributes:
        positive: mean over the positive prompts, float64 [n_layers, d_model].
        negative: mean over the negative ones, likewise.
        norms: geometric mean of the norm of all chosen tokens' states, float64 [n_layers].
        rows: the states of the positive and of the negative prompts, float32 [n_layers, prompts, d_model]; None where
            only running sums were kept.
    """

    positive: Tensor
    negative: Tensor
    norms: Tensor
    rows: tuple[Tensor, Tensor] | None = None

    @property
    def difference(self) -> Tensor:
        """Positive minus negative mean, float64 [n_layers, d_model]."""
        return self.positive - self.negative

    def stream(self, layer: int) -> Stream:
        """Return what one layer is like."""
        low, high = self.negative[layer], self.positive[layer]
        return Stream(float(self.norms[layer]), (low + high) / 2, low, high)


@checked
def profile_stream(profile: Profile, layer: int) -> Stream:
    """Return what one layer of a profiled model is like at last prompt tokens; both sides are the overall mean."""
    rows = profile.layer(layer)[torch.from_numpy(profile.keys[:, 1] == END)].double()
    if not len(rows):
        raise InputError(f"profile of {profile.model.id}: no last-token rows, so that the typical norm is unknown")
    mean = rows.mean(0)
    return Stream(float(_log_norms(rows).mean().exp()), mean, mean, mean)


@checked
def read_contrast(
    lm: LM,
    contrast: Contrast,
    positions: Positions,
    *,
    trigger: Triggers = None,
    keep_rows: bool = False,
    batch_size: int = 16,
) -> Reading:
    """Read both sides of a contrast, every layer, in one pass.

    Memory is bounded by the batch, and with `keep_rows` by one state per prompt and layer. States are read in
    bfloat16, like those of profiles, and added up in float64.

    Args:
        lm: the model, with whatever is attached.
        contrast: the two sides.
        positions: which tokens; of replies `gN`, the first N. `all` is without the first token: its state is the same
            whatever follows and in many models a hundred times as long as others (Sun et al., arXiv 2402.17762), so
            that means over all tokens would differ by little but the prompts' lengths.
        trigger: read at the last token of this string's last occurrence in each prompt instead; a pair of strings
            where the sides have different ones.
        keep_rows: keep each prompt's state, for methods that need more than means.
        batch_size: sequences per forward pass.

    Raises:
        InputError: positions outside a prompt, a trigger that is not there, or sides that cannot differ there.
    """
    texts = (contrast.positive, contrast.negative)
    triggers = trigger if isinstance(trigger, tuple) else (trigger, trigger)
    if trigger is None:
        _require_different(contrast, positions)
    sides = [_encoded(lm, side, positions, mark) for side, mark in zip(texts, triggers, strict=True)]
    n_positive, n = len(sides[0]), len(sides[0]) + len(sides[1])
    totals = torch.zeros(2, lm.n_layers, lm.d_model, dtype=torch.float64)
    log_norms, count = torch.zeros(lm.n_layers, dtype=torch.float64), 0
    rows = torch.empty(lm.n_layers, n, lm.d_model) if keep_rows else None
    with track(f"reading {lm.id}", total=n) as advance:
        at = LAST if trigger is not None else positions
        for owners, means, logs in _prompt_means(lm, sides[0] + sides[1], at, batch_size):
            is_positive = owners < n_positive
            totals[0] += means[:, is_positive].sum(1)
            totals[1] += means[:, ~is_positive].sum(1)
            log_norms += logs.sum(1)
            count += logs.shape[1]
            if rows is not None:
                rows[:, owners] = means.float()
            advance(len(owners))
    kept = None if rows is None else (rows[:, :n_positive], rows[:, n_positive:])
    return Reading(totals[0] / n_positive, totals[1] / (n - n_positive), (log_norms / count).exp(), kept)


def _prompt_means(
    lm: LM, encoded: Sequence[Encoded], positions: Positions, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (numbers of prompts, their states [n_layers, prompts, d_model], log of norms [n_layers, rows]), float64."""
    for owners, layers in _states(lm, encoded, positions, batch_size, skip_first=True):
        numbers, place, counts = torch.tensor(owners).unique(return_inverse=True, return_counts=True)
        means = torch.zeros(lm.n_layers, len(numbers), lm.d_model, dtype=torch.float64)
        logs = torch.empty(lm.n_layers, len(owners), dtype=torch.float64)
        for layer, rows in layers.items():
            values = rows.double()
            logs[layer] = _log_norms(values)
            finite = torch.isfinite(logs[layer])  # no overflow in float64, and ten times faster than all values
            if not finite.all():
                item = owners[int((~finite).nonzero()[0])]
                raise InputError(f"{lm.id}: NaN or infinity in the output of layer {layer} for prompt {item + 1}")
            means[layer] = means[layer].index_add(0, place, values) / counts[:, None]
        yield numbers, means, logs


def _log_norms(rows: Tensor) -> Tensor:
    return rows.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny).log()


# -- which tokens -------------------------------------------------------------------------------------------------


def _encoded(lm: LM, prompts: PromptSet, positions: Positions, trigger: str | None) -> list[Encoded]:
    """Return token ids in which every prompt has the chosen positions."""
    out = []
    for number, one in enumerate(prompts, start=1):
        where = f"{prompts.name}, prompt {number}"
        if trigger is not None:
            out.append(_up_to_trigger(lm, one, trigger, where))
            continue
        encoded = encode(lm, one.text, one.response)
        reach = max(positions.first, positions.last)
        if reach > encoded.n_prompt:
            raise InputError(
                f"{where}: positions {positions} reach outside its {encoded.n_prompt} tokens; use fewer positions"
            )
        if positions.generated and not reach and len(encoded.ids) == encoded.n_prompt:
            raise InputError(f"{where}: positions {positions} are in a reply, and it has none; use l1, or give replies")
        out.append(encoded)
    return out


def _up_to_trigger(lm: LM, prompt: Prompt, trigger: str, where: str) -> Encoded:
    """Return the prompt's tokens up to the last one of the trigger.

    A state depends on nothing that follows, so the trigger's position is the last one of what is left.
    """
    text = prompt.text.strip()
    at = text.rfind(trigger)
    if not trigger or at < 0:
        raise InputError(f"{where}: the prompt {text[:40]!r} ... does not hold the trigger {trigger!r}")
    encoded, stop = encode(lm, prompt.text), at + len(trigger)
    found = [index for index, end in enumerate(encoded.text_ends) if end == stop]
    if not found:
        beyond = next((index for index, end in enumerate(encoded.text_ends) if end > stop), None)
        reason = "its chat template rewrites the user's words"
        if beyond is not None:
            reason = f"the token {lm.tokenizer.decode([encoded.ids[beyond]])!r} runs past the trigger's end"
        raise InputError(
            f"{where}: the tokenizer of {lm.id} ends no token where the trigger {trigger!r} ends ({reason}); put a "
            "space after the trigger, or choose one that ends where a token ends"
        )
    index = found[-1]
    start = next(i for i, end in enumerate(encoded.text_ends) if end > at)
    if lm.tokenizer.unk_token_id is not None and lm.tokenizer.unk_token_id in encoded.ids[start : index + 1]:
        raise InputError(f"{where}: the tokenizer of {lm.id} has no token for the trigger {trigger!r}, only 'unknown'")
    ids = encoded.ids[: index + 1]
    return Encoded(ids, len(ids), encoded.text_ends[: index + 1])


def _require_different(contrast: Contrast, positions: Positions) -> None:
    """Raise `InputError` for replies to one prompt that are read before the replies begin."""
    if positions.prefill_only and contrast.positive.texts == contrast.negative.texts:
        raise InputError(
            f"{contrast.name}: both sides have the same prompts, so that their states at positions {positions} are "
            "the same; where the sides are replies, read at positions like g1 or g8"
        )
