"""Replacing a layer's states, token by token, by states that were mapped from another model at the same text.

Which token takes which says `commandv.mapping.tokens`; a token without a counterpart, such as those of the prompt
format but the last, keeps the recipient's own state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commandv.arguments import checked
from commandv.errors import InputError
from commandv.mapping.mappers import Mapper
from commandv.mapping.tokens import Pairing, Places, place
from commandv.models.encoding import Batch, model_inputs, pad, run_blocks
from commandv.models.generation import batches
from commandv.models.live import attach_change, reading
from commandv.models.lm import LM
from commandv.models.passes import Edit, Pass
from commandv.models.running import own_pass
from commandv.positions import EVERYWHERE
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


@checked
def pairing(many: Sequence[Counterparts]) -> Pairing:
    """Tell which tokens of some texts have a counterpart."""
    n = sum(one.places.n_text for one in many)
    paired = sum(int((~one.places.is_end).sum()) for one in many)
    exact = sum(int((one.places.exact & ~one.places.is_end).sum()) for one in many)
    return Pairing(exact / n, (paired - exact) / n, (n - paired) / n, n)


@checked
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
            seen: list[Tensor] = []
            with reading(lm, {layer: seen.append}):
                run_blocks(lm, pad(lm, [rows[i] for i in members], "right"))
            for row, item in enumerate(members):
                out[item] = seen[-1][row, : len(rows[item])].cpu()
            advance(len(members))
    return out


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
        seen: list[Tensor] = []
        with own_pass(self.donor), reading(self.donor, {self._mapper.pair.donor: seen.append}):
            out = self.donor.model(**inputs)
        self._cache = out.past_key_values
        states = seen[-1].flatten(0, 1)
        return self._mapper(states, torch.zeros(len(states), dtype=torch.bool)).unflatten(0, tuple(ids.shape))


@checked
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
    known = {one.ids: (torch.from_numpy(one.places.columns), one.mapped(mapper)) for one in counterparts}
    with attach_change(lm, _Replacing(lm.id, mapper.pair.recipient, known, along)):
        yield


class _Replacing:
    """What `replaced` attaches: what to put where is known when a pass begins."""

    name = "mapped states"

    def __init__(
        self, id: str, layer: int, known: Mapping[tuple[int, ...], tuple[Tensor, Tensor]], along: Along | None
    ) -> None:
        self._id, self._known, self._along = id, known, along
        self.layers, self.positions = [layer], {EVERYWHERE}
        self._lengths = sorted({len(ids) for ids in known}, reverse=True)

    def __str__(self) -> str:
        return f"{self.name} at layer {self.layers[0]}"

    def edits(self, run: Pass) -> dict[int, Edit]:
        ids, (start, stop) = run.ids, run.columns()
        if ids is None:
            raise InputError(f"{self._id}: states are replaced by tokens; run the model on input_ids")
        mask = run.prompt(stop)
        pending = None if start else self._begun(ids, mask)
        if self._along is not None:
            states = self._along.read(ids, mask.long(), first=not start)
            if start:
                rows, columns = torch.ones_like(ids).nonzero(as_tuple=True)
                pending = rows, columns, states.flatten(0, 1)
        if pending is None:
            return {}
        rows, columns, states = pending

        def replace(h: Tensor) -> Tensor:
            return h.index_put_((rows.to(h.device), columns.to(h.device)), states.to(h))

        return {self.layers[0]: replace}

    def _begun(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns, states = [], [], []
        for row, (tokens, real) in enumerate(zip(ids, mask, strict=True)):
            begins = tuple(tokens[real].tolist())
            length = next((n for n in self._lengths if begins[:n] in self._known), None)
            if length is None:
                raise InputError(
                    f"{self._id}: a sequence of {len(begins)} tokens begins like none of the {len(self._known)} "
                    "texts whose states are to be replaced; read the counterparts of the texts that are run"
                )
            places, new = self._known[begins[:length]]
            columns.append(real.nonzero()[:, 0][places.to(real.device)])
            rows.append(torch.full_like(columns[-1], row))
            states.append(new)
        return torch.cat(rows), torch.cat(columns), torch.cat(states)
