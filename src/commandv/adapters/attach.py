"""Attaching an adapter to a live model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.edit import Edit
from commandv.adapters.outline import require_scale, require_shape
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.models.live import Attachment, attach_change
from commandv.models.lm import LM
from commandv.models.passes import Addend, Additions
from commandv.positions import MOST


@checked
def attach(lm: LM, adapter: Adapter, *, scale: float = 1.0, n_prompt: int | None = None) -> Attachment:
    """Attach an adapter to a model: as a context manager, or as a handle with `detach()`.

    Attached adapters add up; one attached later reads a stream that the earlier ones have changed. While attached,
    `lm.model.generate` and plain forward passes both apply it, hidden states that the model returns show it, and
    `repr(lm)` names it; `detach_all(lm)` takes everything off. It acts on this thread and on threads that start
    later; a thread that was running gets an error instead. A copy of the model is a model without it.

    In `generate` the prompt is what `generate` was given, however it is fed. In a plain pass every real token of a
    sequence that starts without a cache counts as prompt, and what follows in the cache as generated; give `n_prompt`
    where that is not so (replies run through in one pass, uncached loops written by hand, prompts fed in chunks).

    Args:
        lm: the model.
        adapter: what to attach.
        scale: factor on its deltas.
        n_prompt: columns of the batch, padding included, that hold the prompt; later columns hold generated tokens.

    Returns:
        The handle.

    Raises:
        MismatchError: the adapter is for another model, width or depth.
        InputError: the scale is not a finite number, `n_prompt` no number of columns, or another thread is running the
            model or has something attached to it; while attached, a pass in which the positions cannot be known.
        ModelError: the model is compiled.
    """
    adapter.model.require(lm.ref, f"adapter {adapter.name}")
    require_shape(adapter, lm.d_model, lm.n_layers, lm.id)
    require_scale(scale)
    if n_prompt is not None and not (isinstance(n_prompt, int) and 0 <= n_prompt <= MOST):
        raise InputError(f"n_prompt={n_prompt!s:.40}: expected columns of the prompt, a whole number up to {MOST}")
    addends = {layer: _joined(many, scale) for layer, many in adapter.interventions.items()}
    return attach_change(lm, Additions(adapter.name, addends, scale, n_prompt))


class _Moving:
    """An edit where the stream is."""

    def __init__(self, edit: Edit) -> None:
        self.positions, self._edit, self._device = edit.positions, edit, edit.device

    def delta(self, h: Tensor) -> Tensor:
        if self._device != h.device:
            self._edit, self._device = self._edit.to(h.device), h.device
        return self._edit.delta(h.float()).to(h.dtype)


def _joined(edits: Sequence[Edit], scale: float) -> list[Addend]:
    groups: dict[Hashable, list[Edit]] = defaultdict(list)
    for one in edits:
        groups[one.group].append(one)
    return [_Moving(first.joined(others).scaled(scale)) for first, *others in groups.values()]
