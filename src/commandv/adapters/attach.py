"""Attaching an adapter to a live model."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from commandv.adapters.adapter import Adapter
from commandv.adapters.edit import Edit, require_scale
from commandv.errors import InputError, MismatchError
from commandv.models.load import LM
from commandv.positions import Positions

_TAP = "_commandv_tap"
_KNOWN = (__name__, "commandv.models.load", "transformers.")  # modules whose hooks treat every pass alike


def attach(lm: LM, adapter: Adapter, *, scale: float = 1.0, n_prompt: int | None = None) -> Attachment:
    """Attach an adapter to a model: as a context manager, or as a handle with `detach()`.

    Attached adapters add up; one attached later reads a stream that the earlier ones have changed. While attached,
    `lm.model.generate` and plain forward passes both apply it. In a plain pass every real token of a sequence that
    starts without a cache counts as prompt, and what follows in the cache as generated; give `n_prompt` where that
    is not so (replies run through in one pass, uncached loops written by hand, prompts fed in chunks).

    Args:
        lm: the model.
        adapter: what to attach.
        scale: factor on its deltas.
        n_prompt: columns of the batch, padding included, that hold the prompt; later columns hold generated tokens.

    Returns:
        The handle.

    Raises:
        MismatchError: the adapter is for another model, width or depth.
        InputError: the scale is not a finite number.
    """
    adapter.model.require(lm.ref, f"adapter {adapter.name}")
    if adapter.d_model != lm.d_model or adapter.layers[-1] >= lm.n_layers:
        raise MismatchError(
            f"adapter {adapter.name}: width {adapter.d_model}, layers up to {adapter.layers[-1]}; {lm.id} has width "
            f"{lm.d_model} and layers 0 .. {lm.n_layers - 1}. paste() carries an adapter between models"
        )
    require_scale(scale)
    if scale not in (0.0, 1.0):
        adapter.scaled(scale)  # says so where the deltas overflow
    return Attachment(lm, adapter, scale, n_prompt)


def attached(lm: LM) -> bool:
    """True while an adapter is attached to the model."""
    return _TAP in lm.model.__dict__


def attached_positions(lm: LM) -> set[Positions]:
    """Return where the attached adapters act."""
    return set().union(*(one.positions for one in lm.model.__dict__[_TAP].attachments)) if attached(lm) else set()


def hooked_by_others(lm: LM) -> bool:
    """True when a module of the model has forward hooks that neither adapters nor loading it put there."""
    hooks = [
        hook
        for module in lm.model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return not all((getattr(hook, "__module__", None) or "").startswith(_KNOWN) for hook in hooks)


@contextlib.contextmanager
def prompts_of(lm: LM, n_prompt: int) -> Iterator[None]:
    """Tell attached adapters that what is run is the beginning of prompts of so many columns, or of longer ones."""
    tap = lm.model.__dict__.get(_TAP)
    if tap is None:
        yield
        return
    before, tap.n_prompt = tap.n_prompt, n_prompt
    try:
        yield
    finally:
        tap.n_prompt = before


class Attachment:
    """An adapter on a live model; `detach()` (or the end of a `with` block) restores the model exactly."""

    def __init__(self, lm: LM, adapter: Adapter, scale: float, n_prompt: int | None) -> None:
        self._lm, self._n_prompt = lm, n_prompt
        self._seen = 0  # outside generate: columns of the last pass without a cache
        self._edits = {layer: _group(many, scale) for layer, many in adapter.interventions.items()}
        self.positions = {edit.positions for edits in self._edits.values() for edit in edits}
        self._owner_forward, self._model_forward = (inspect.signature(m.forward) for m in (lm.owner, lm.model))
        self._given: dict[str, Any] = {}  # the mask of the pass through the whole model, while one runs
        self._tap = _Tap.of(lm.model)
        self._tap.attachments.append(self)
        self._block_handles: list[Any] = []
        # Block hooks exist only during a pass that has something to change, so a decode step of a prefill-only
        # adapter runs the blocks untouched.
        self._handles = [
            lm.model.register_forward_pre_hook(self._enter_model, with_kwargs=True),
            lm.model.register_forward_hook(self._leave_model, always_call=True),
            lm.owner.register_forward_pre_hook(self._before, with_kwargs=True),
            lm.owner.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        """Take the adapter off; doing so twice is harmless."""
        if not self._handles:
            return
        for handle in [*self._handles, *self._block_handles]:
            handle.remove()
        self._handles, self._block_handles = [], []
        self._tap.attachments.remove(self)
        if not self._tap.attachments:
            self._tap.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _enter_model(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        # Some models (Gemma 3 with its vision tower) hand the blocks' owner masks that no longer show the padding.
        self._given = {"attention_mask": _arguments(self._model_forward, args, kwargs).get("attention_mask")}

    def _leave_model(self, *_: Any) -> None:
        self._given = {}

    def _before(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = {**_arguments(self._owner_forward, args, kwargs), **self._given}
        tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        assert tokens is not None, "a forward pass without input_ids or inputs_embeds"
        cache = inputs.get("past_key_values")
        start = cache.get_seq_length() if cache is not None else 0
        stop = start + tokens.shape[1]
        n_prompt = self._n_prompt or self._tap.n_prompt
        if n_prompt is None:  # no `generate` around: a pass without a cache is the prompt of what follows
            n_prompt = self._seen = stop if not start else self._seen
        if not any(positions.touches(n_prompt, start) for positions in self.positions):
            return
        prompt = _prompt_mask(inputs.get("attention_mask"), tokens, n_prompt)
        places = {positions: _Places(positions.select(prompt, start, stop)) for positions in self.positions}
        for layer, edits in self._edits.items():
            live = [(edit, places[edit.positions]) for edit in edits if places[edit.positions].any]
            if live:
                self._block_handles.append(self._lm.blocks[layer].register_forward_hook(_edit_hook(live)))

    def _after(self, *_: Any) -> None:
        for handle in self._block_handles:
            handle.remove()
        self._block_handles = []


def _arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return what a call passes by name, whether it was passed by position, by keyword or through `**kwargs`."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


def _prompt_mask(attention_mask: Any, tokens: Tensor, n_prompt: int) -> Tensor:
    """Return the mask [batch, n_prompt] of real prompt tokens in the batch of this forward pass."""
    if attention_mask is None:
        return torch.ones((tokens.shape[0], n_prompt), dtype=torch.bool, device=tokens.device)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        # Of a prompt fed in chunks, what is still to come is real: padding is at its left.
        mask = attention_mask[:, :n_prompt].bool()
        return nn.functional.pad(mask, (0, n_prompt - mask.shape[1]), value=True)
    raise InputError(
        "attach needs the two-dimensional attention mask [batch, sequence]; static caches and prepared "
        "four-dimensional masks hide where the padding is. Use the default dynamic cache"
    )


class _Tap:
    """Tells the attachments of one model where the prompt ends while `generate` runs, by wrapping it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.attachments: list[Attachment] = []
        self.n_prompt: int | None = None  # columns of the prompt while generate runs
        original = model.generate
        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            bound = _arguments(signature, args, kwargs)
            names = ("inputs", "input_ids", "inputs_embeds")
            tokens = next((bound[name] for name in names if bound.get(name) is not None), None)
            before, self.n_prompt = self.n_prompt, None if tokens is None else tokens.shape[1]
            try:
                return original(*args, **kwargs)
            finally:
                self.n_prompt = before

        model.generate = generate  # an instance attribute, so that removing it brings the class's method back

    @classmethod
    def of(cls, model: nn.Module) -> _Tap:
        tap = model.__dict__.get(_TAP)
        if tap is None:
            tap = cls(model)
            model.__dict__[_TAP] = tap
        return tap

    def remove(self) -> None:
        del self.model.__dict__["generate"], self.model.__dict__[_TAP]


class _Live:
    """An edit where the stream is."""

    def __init__(self, edit: Edit) -> None:
        self.positions, self.edit, self.device = edit.positions, edit, edit.device

    def delta(self, h: Tensor) -> Tensor:
        if self.device != h.device:
            self.edit, self.device = self.edit.to(h.device), h.device
        return self.edit.delta(h.float()).to(h.dtype)


class _Places:
    """Positions in one forward pass as row and column indices, computed once for all layers."""

    def __init__(self, mask: Tensor) -> None:
        self.rows, self.columns = mask.nonzero(as_tuple=True)
        self.any = bool(len(self.rows))
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {mask.device: (self.rows, self.columns)}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._moved:
            self._moved[device] = (self.rows.to(device), self.columns.to(device))
        return self._moved[device]


def _group(edits: tuple[Edit, ...], scale: float) -> list[_Live]:
    groups: dict[Hashable, list[Edit]] = defaultdict(list)
    for one in edits:
        groups[one.group].append(one)
    return [_Live(first.joined(others).scaled(scale)) for first, *others in groups.values()]


def _edit_hook(live: list[tuple[_Live, _Places]]) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_block: nn.Module, _inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        changed = h
        for edit, places in live:
            at = places.on(h.device)
            changed = changed.index_put(at, edit.delta(h[at]), accumulate=True)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
