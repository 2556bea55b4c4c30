"""Replacing a layer's states, token by token, by states that were mapped from another model at the same text.

Which token takes which says `commandv.mapping.pairing`; a token without a counterpart, such as those of the prompt
format but the last, keeps the recipient's own state.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commandv.errors import InputError
from commandv.mapping.mappers import Mapper
from commandv.mapping.pairing import Pairing, Places, place
from commandv.models.encoding import Batch, model_inputs, pad, run_blocks
from commandv.models.generation import batches
from commandv.models.load import LM
from commandv.progress import track
from commandv.prompts.sets import PromptSet
from commandv.transfer.match import LayerPair


@dataclass(frozen=True, eq=False)
class Counterparts:
    """The states of two models at the paired tokens of one text.

    Attributes:
        places: the tokens.
        donor: the donor's states at the counterparts, [k, d_donor].
        own: the recipient's own states, [k, d_recipient].
    """

    places: Places
    donor: Tensor
    own: Tensor

    @property
    def ids(self) -> tuple[int, ...]:
        """The recipient's tokens."""
        return tuple(self.places.ids)

    def mapped(self, mapper: Mapper) -> Tensor:
        """Return what a mapper makes of the donor's states, float32 [k, d_recipient]."""
        return mapper(self.donor, torch.from_numpy(self.places.is_end))


def pairing(many: Sequence[Counterparts]) -> Pairing:
    """Tell which tokens of some texts have a counterpart."""
    n = sum(one.places.n_text for one in many)
    paired = sum(int((~one.places.is_end).sum()) for one in many)
    exact = sum(int((one.places.exact & ~one.places.is_end).sum()) for one in many)
    return Pairing(exact / n, (paired - exact) / n, (n - paired) / n, n)


def read_counterparts(
    donor: LM, recipient: LM, pair: LayerPair, texts: PromptSet, *, until: int | None = None, batch_size: int = 8
) -> list[Counterparts]:
    """Let both models read texts in their own prompt formats, and pair their states at one layer each.

    Args:
        donor: the model whose states are to be mapped.
        recipient: the model that takes them.
        pair: a layer of each.
        texts: user turns, and the replies to them where they have one.
        until: stop after so many of the recipient's tokens of each text, before the last prompt token; None goes on
            to the end.
        batch_size: sequences per forward pass.

    Raises:
        InputError: a text that is longer than a context, or of which no token has a counterpart.
    """
    if until is not None and until < 1:
        raise InputError(f"{until} tokens of each text: expected 1 or more")
    places = [place(donor, recipient, one, until) for one in texts]
    given = _states(donor, pair.donor, [one.donor_ids for one in places], batch_size)
    own = _states(recipient, pair.recipient, [one.ids for one in places], batch_size)
    return [
        Counterparts(one, theirs[torch.from_numpy(one.partners)], ours[torch.from_numpy(one.columns)])
        for one, theirs, ours in zip(places, given, own, strict=True)
    ]


@torch.inference_mode()
def _states(lm: LM, layer: int, rows: list[list[int]], batch_size: int) -> list[Tensor]:
    """Return one layer's states of each row, [tokens, d_model], on the CPU in the model's dtype."""
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    with track(f"reading {lm.id}", total=len(rows)) as advance:
        for members in batches([len(row) for row in rows], batch_size):
            with _watched(lm, layer) as seen:
                run_blocks(lm, pad(lm, [rows[i] for i in members], "right"))
            for row, item in enumerate(members):
                out[item] = seen[-1][row, : len(rows[item])].cpu()
            advance(len(members))
    return out


@contextlib.contextmanager
def _watched(lm: LM, layer: int) -> Iterator[list[Tensor]]:
    """Yield a list that takes the layer's output [batch, sequence, d_model] of each pass."""
    seen: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append(_stream(output))

    handle = lm.blocks[layer].register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class Along:
    """Lets the donor read along with a reply that the recipient writes, so that its tokens' states are mapped too.

    Args:
        donor: the donor; it must make the same tokens of every prompt, as a fine-tuned version does.
        mapper: what its states go through.
    """

    def __init__(self, donor: LM, mapper: Mapper) -> None:
        self.donor, self._mapper = donor, mapper
        self._cache: Any = None

    def read(self, ids: Tensor, mask: Tensor, *, first: bool) -> Tensor:
        """Read tokens [batch, n] that follow what was read; return mapped states [batch, n, d_recipient].

        Args:
            ids: the tokens.
            mask: attention mask [batch, sequence] over all that was read, these tokens included.
            first: forget what was read before.
        """
        ids, mask = ids.to(self.donor.device), mask.to(self.donor.device)
        batch = Batch(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :])
        past = None if first else self._cache
        inputs = model_inputs(self.donor.model, batch, keep=1, use_cache=True, past=past)
        with _watched(self.donor, self._mapper.pair.donor) as seen:
            out = self.donor.model(**inputs)
        self._cache = out.past_key_values
        states = seen[-1].flatten(0, 1)
        return self._mapper(states, torch.zeros(len(states), dtype=torch.bool)).unflatten(0, tuple(ids.shape))


@contextlib.contextmanager
def replaced(
    lm: LM, counterparts: Sequence[Counterparts], mapper: Mapper, along: Along | None = None
) -> Iterator[None]:
    """Run a model with states of the mapper's layer replaced by mapped ones, as long as the block lasts.

    Every sequence must begin with the tokens of one of the texts. Their states are replaced in the pass that starts
    it; what follows, in that pass or from the cache, is the model's own, unless a donor reads along.

    Args:
        lm: the recipient.
        counterparts: the texts and the donor's states at them.
        mapper: makes them the recipient's.
        along: the donor, to map the states of generated tokens as well.

    Raises:
        InputError: the donor that reads along is the recipient itself; while running, a sequence that begins like none
            of the texts.
    """
    if along is not None and along.donor.model is lm.model:
        raise InputError(f"{lm.id} cannot read along with itself while its states are replaced; load the donor apart")
    edit = _Edit(
        lm, {one.ids: (torch.from_numpy(one.places.columns), one.mapped(mapper)) for one in counterparts}, along
    )
    handles = [
        lm.model.register_forward_pre_hook(edit.before, with_kwargs=True),
        lm.blocks[mapper.pair.recipient].register_forward_hook(edit.after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Edit:
    """The hooks of `replaced`: what to put where is known when a pass begins."""

    def __init__(self, lm: LM, known: Mapping[tuple[int, ...], tuple[Tensor, Tensor]], along: Along | None) -> None:
        self._lm, self._known, self._along = lm, known, along
        self._lengths = sorted({len(ids) for ids in known}, reverse=True)
        self._signature = inspect.signature(lm.model.forward)
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None  # rows, columns, states

    def before(self, _module: Any, args: Any, kwargs: Any) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        ids, mask, cache = (given.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        assert ids is not None, "a forward pass without input_ids"
        read = 0 if cache is None else cache.get_seq_length()
        first = not read
        if mask is None:  # generate leaves it out where nothing is padded
            mask = torch.ones((len(ids), read + ids.shape[1]), dtype=torch.long, device=ids.device)
        self._pending = self._begun(ids, mask) if first else None
        if self._along is not None:
            states = self._along.read(ids, mask, first=first)
            if not first:
                rows, columns = torch.ones_like(ids).nonzero(as_tuple=True)
                self._pending = rows, columns, states.flatten(0, 1)

    def _begun(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns, states = [], [], []
        for row, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True)):
            begins = tuple(tokens[real].tolist())
            length = next((n for n in self._lengths if begins[:n] in self._known), None)
            if length is None:
                raise InputError(
                    f"{self._lm.id}: a sequence of {len(begins)} tokens begins like none of the {len(self._known)} "
                    "texts whose states are to be replaced; read the counterparts of the texts that are run"
                )
            places, new = self._known[begins[:length]]
            columns.append(real.nonzero()[:, 0][places.to(real.device)])
            rows.append(torch.full_like(columns[-1], row))
            states.append(new)
        return torch.cat(rows), torch.cat(columns), torch.cat(states)

    def after(self, _module: Any, _inputs: Any, output: Any) -> Any:
        if self._pending is None:
            return output
        h = _stream(output)
        rows, columns, states = (part.to(h.device) for part in self._pending)
        changed = h.index_put((rows, columns), states.to(h.dtype))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed
