"""What the arms of one comparison are made of: a donor's adapter, or directions that both models have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, Intervention
from commandv.errors import InputError
from commandv.models.layers import LayerChoice, all_layers, choose_layers
from commandv.models.load import LM
from commandv.positions import EVERYWHERE, Positions
from commandv.profiles.profile import END, Profile, Rows
from commandv.prompts.sets import PromptSet
from commandv.steering import carry_directions, from_directions
from commandv.steering.carrying import Rescale
from commandv.transfer.convert import Fitter, Ridge
from commandv.transfer.convert.kept import Kept
from commandv.transfer.link import Link
from commandv.transfer.match import Matcher, covering, nearest, proportional
from commandv.transfer.paste import random_like


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the arms of one comparison are made of.

    Attributes:
        adapter: the donor's.
        donor: profile of the donor.
        recipient: profile of the recipient, over the same prompts.
        donor_lm: the donor itself; for the text bridge.
        recipient_lm: the recipient itself; for the text bridge.
        prompts: task-agnostic prompts, those of the profiles; for the text bridge.
        direct: an adapter that was trained on the recipient, or None when there is none to compare with.
        fit: of the pasted arm.
        match: of the pasted arm.
        layers: of the pasted arm, and of the controls that mirror it.
        read_rows: of the pasted arm.
        write_rows: of the pasted arm.
        published_match: of the published method.
        published_layers: of the published method.
        seed: of random controls.
        kept: fits, and what the text bridge read, for all arms.
    """

    adapter: Adapter
    donor: Profile
    recipient: Profile
    donor_lm: LM
    recipient_lm: LM
    prompts: PromptSet
    direct: Adapter | None = None
    fit: Fitter = Ridge()
    match: Matcher = proportional
    layers: LayerChoice | str = "last_third"
    read_rows: Rows = "end"
    write_rows: Rows | None = None
    published_match: Matcher = nearest
    published_layers: LayerChoice | str = all_layers
    seed: int = 0
    kept: Kept = field(default_factory=Kept, repr=False)

    def link(self, **changes: Any) -> Link:
        """Return the link that the pasted arm goes through; `changes` are fields of `Link`."""
        fields: dict[str, Any] = {"fit": self.fit, "read_rows": self.read_rows, "write_rows": self.write_rows}
        return Link(self.donor, self.recipient, kept=self.kept, **(fields | changes))

    def pasted(
        self, *, match: Matcher | None = None, layers: LayerChoice | str | None = None, **changes: Any
    ) -> Adapter:
        """Return the pasted arm; `changes` are fields of `Link`."""
        return self.link(**changes).paste(self.adapter, match=match or self.match, layers=layers or self.layers)

    def fidelity(self) -> list[dict[str, float]]:
        """Return the converters' quality on prompts that they have not seen, by layer pair; see `Fidelity`."""
        return [row._asdict() for row in self.link().fidelity(self.adapter, match=self.match, layers=self.layers)]

    def random(self) -> Adapter:
        """Return deltas that have the pasted adapter's norm on every state, in random directions."""
        return random_like(self.pasted(), self.seed)

    def mean_ablation(self) -> Adapter:
        """Return what replaces the state by its mean over the profile's last-token rows: h + (mean - h).

        It acts at the pasted adapter's layers and positions, and tells what destroying what is there does.
        """
        like, profile = self.pasted(), self.recipient
        ends = torch.from_numpy(profile.keys[:, 1] == END)
        identity = torch.eye(profile.d_model)

        def replaced(layer: int) -> tuple[Intervention, ...]:
            mean = profile.layer(layer)[ends].double().mean(0).float()
            return (Intervention(identity, -mean, -identity, positions=like.interventions[layer][0].positions),)

        interventions = {layer: replaced(layer) for layer in like.layers}
        return Adapter(interventions, like.model, f"mean ablation where {like.name} acts")

    def own(self) -> Adapter:
        """Return the adapter trained on the recipient itself.

        Raises:
            InputError: there is none.
        """
        if self.direct is None:
            raise InputError("no adapter trained on the recipient is given; give one, or leave the direct arm out")
        return self.direct


@dataclass(frozen=True, kw_only=True)
class DirectionMaterial(Material):
    """Material of a comparison of directions, one per layer, which each model has of its own.

    Attributes:
        directions: the donor's, [n_layers, d_model].
        native: the recipient's own, [n_layers, d_model].
        kind: how they are applied, a name in `steering.APPLICATIONS`.
        strength: as in `from_directions`.
        at: tokens to act on.
        rescale: as in `carry_directions`.
    """

    directions: Tensor
    native: Tensor
    kind: str = "add"
    strength: float = 1.0
    at: Positions = EVERYWHERE
    rescale: Rescale | None = None
    match: Matcher = covering
    published_match: Matcher = covering

    def pasted(
        self, *, match: Matcher | None = None, layers: LayerChoice | str | None = None, **changes: Any
    ) -> Adapter:
        """Return the carried directions, applied as the native ones are; `changes` are fields of `Link`."""
        carried = self._carried(match=match, layers=layers, **changes)
        facts = {"made_by": "carry_directions", "donor": self.donor.model.id, "prompts": self.donor.prompts}
        return replace(self._applied(carried, self.kind), provenance=facts)

    def fidelity(self) -> list[dict[str, float]]:
        """Return by layer the cosine of the carried direction to the recipient's own.

        Each dimension is in units of its standard deviation in the recipient's last-token rows, so that a few
        giant ones do not decide; `n` counts these rows.
        """
        ends = torch.from_numpy(self.recipient.keys[:, 1] == END)
        carried, rows = self._carried(), []
        for pair in self.match(self.donor, self.recipient, range(self.donor.n_layers)):
            if pair.recipient in carried:
                spread = self.recipient.layer(pair.recipient)[ends].double().std(0).clamp(min=1e-12)
                ours, own = (v[pair.recipient].double() / spread for v in (carried, self.native))
                cosine = torch.cosine_similarity(ours, own, dim=0)
                rows.append({**pair._asdict(), "n": float(ends.sum()), "native_cosine": float(cosine)})
        return rows

    def random(self) -> Adapter:
        """Return random directions, each as long as the carried one, applied in its place."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for layer, v in self._carried().items():
            drawn = torch.randn(v.shape, generator=generator)
            found[layer] = drawn / drawn.norm() * v.norm()
        return self._applied(found, self.kind)

    def mean_ablation(self) -> Adapter:
        """Return what gives every state the mean's part along the carried direction."""
        return self._applied(self._carried(), "mean-ablate", 1.0)

    def own(self) -> Adapter:
        """Return the recipient's own directions on the same layers."""
        layers = choose_layers(self.layers, self.recipient.n_layers)
        return self._applied({layer: self.native[layer] for layer in layers}, self.kind)

    def _carried(
        self, *, match: Matcher | None = None, layers: LayerChoice | str | None = None, **changes: Any
    ) -> dict[int, Tensor]:
        return carry_directions(
            self.directions, self.link(**changes), match=match or self.match, layers=layers or self.layers,
            rescale=self.rescale,
        )  # fmt: skip

    def _applied(self, directions: Mapping[int, Tensor], kind: str, strength: float | None = None) -> Adapter:
        amount = self.strength if strength is None else strength
        return from_directions(
            directions, self.recipient.model, kind=kind, strength=amount, at=self.at, typical=self.recipient,
            name=self.adapter.name,
        )  # fmt: skip
