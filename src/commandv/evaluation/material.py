"""What the arms of one comparison are made of: a linked pair of models, a donor's adapter or directions, prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, Intervention
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.evaluation.tuning import Setting
from commandv.models.layers import all_layers
from commandv.models.lm import LM
from commandv.positions import EVERYWHERE, Positions
from commandv.profiles.profile import END
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering import carry_directions, from_directions
from commandv.steering.carrying import Rescale
from commandv.transfer.distil.demonstrate import Keep, demonstrate
from commandv.transfer.distil.demonstrations import Demonstrations
from commandv.transfer.link import Link
from commandv.transfer.match import Matcher, covering, nearest, proportional
from commandv.transfer.paste import as_published, random_like

ANSWER_TOKENS = 48  # of the donor's answers, as many as are graded


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What the arms of one comparison are made of. An arm says what it needs of it (`arms.Arm.needs`).

    Attributes:
        adapter: the donor's; without a link the recipient's own, which is then measured as it is.
        link: the two models; that of the pasted arm.
        recipient_lm: the recipient itself.
        donor_lm: the donor itself.
        prompts: task-agnostic prompts, those of the profiles.
        asked: prompts of the behaviour, which the donor answers for the arms that learn from its answers; none that
            is tested on.
        direct: an adapter that was trained on the recipient with the original data.
        match: of the pasted arm.
        setting: of the pasted arm, and of those that mirror it.
        mirrored: what the random controls are like, where that is not the pasted arm.
        shown: the donor's answers, where they are at hand already.
        keep: which answers of the donor may be kept; see `demonstrate`.
        seed: of what is drawn at random.
    """

    adapter: Adapter
    recipient_lm: LM
    link: Link | None = None
    donor_lm: LM | None = None
    prompts: PromptSet | None = None
    asked: PromptSet | None = None
    direct: Adapter | None = None
    match: Matcher = proportional
    setting: Setting = Setting()
    mirrored: Adapter | None = None
    shown: Demonstrations | None = None
    keep: Keep | None = None
    seed: int = 0

    def lacks(self, needs: frozenset[str]) -> list[str]:
        """Return the names among `needs` of what is not there."""
        return sorted(name for name in needs if getattr(self, name) is None)

    def linked(self) -> Link:
        """Return the link that the pasted arm goes through: with the rows of the setting, where it says any.

        Raises:
            InputError: there is none.
        """
        if self.link is None:
            raise InputError("no link between two models is given; give link=, or leave out what is carried")
        rows = self.setting.rows
        return self.link if rows in (None, self.link.write_rows) else replace(self.link, write_rows=rows)

    def pasted(self, link: Link | None = None) -> Adapter:
        """Return the pasted arm at the layers of the setting; through another link where one is given."""
        if link is None and self.link is None:
            return self.adapter
        return (link or self.linked()).paste(self.adapter, match=self.match, layers=self.setting.layers)

    def published(self) -> Adapter:
        """Return the adapter as it was published: see `commandv.published`."""
        return as_published(self.linked()).paste(self.adapter, match=nearest, layers=all_layers)

    def fidelity(self) -> list[dict[str, float]]:
        """Return the converters' quality on prompts that they have not seen, by layer pair; see `Fidelity`."""
        found = self.linked().fidelity(self.adapter, match=self.match, layers=self.setting.layers)
        return [row._asdict() for row in found]

    def random(self, *, in_span: bool = False) -> Adapter:
        """Return deltas of the norm of the pasted adapter, or of `mirrored`, on every state, in random directions.

        Args:
            in_span: draw the directions as the recipient's own activations vary, not from the whole space.
        """
        like = self.mirrored or self.pasted()
        return random_like(like, self.seed, within=self.linked().recipient if in_span else None)

    def mean_ablation(self) -> Adapter:
        """Return what replaces the state by its mean over the profile's last-token rows: h + (mean - h).

        It acts at the pasted adapter's layers and positions, and tells what destroying what is there does.
        """
        like, profile = self.pasted(), self.linked().recipient
        ends = torch.from_numpy(profile.keys[:, 1] == END)
        identity = torch.eye(profile.d_model)

        def replaced(layer: int) -> tuple[Intervention, ...]:
            mean = profile.layer(layer)[ends].double().mean(0).float()
            return (Intervention(identity, -mean, -identity, positions=like.interventions[layer][0].positions),)

        interventions = {layer: replaced(layer) for layer in like.layers}
        return Adapter(interventions, like.model, f"mean ablation where {like.name} acts")

    def demonstrations(self) -> Demonstrations:
        """Return the donor's answers to the behaviour's prompts, and what its adapter changes in them.

        Raises:
            InputError: no donor or no prompts, or no answer that is any good.
        """
        if self.donor_lm is None or self.asked is None:
            raise InputError("the donor's answers are wanted: give donor_lm= and asked=, or leave out the arms of them")
        donor, asked, keep = self.donor_lm, self.asked, self.keep
        return self.shown or self.kept(
            ("demonstrations", self.adapter),
            lambda: demonstrate(donor, self.adapter, asked, keep=keep, max_new_tokens=ANSWER_TOKENS, batch_size=64),
        )

    def donors_answers(self) -> PromptSet:
        """Return the prompts of the behaviour with the donor's answers to them."""
        found = self.demonstrations()
        pairs = zip(found.prompts, found.answers, strict=True)
        return PromptSet(tuple(Prompt(*one) for one in pairs), "answers of the donor")

    def kept(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Return what was made under this name before, or make it; it does not depend on the setting."""
        if self.link is None or self.link.kept is None:
            return make()
        return self.link.kept.get(name, make)


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
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

    def pasted(self, link: Link | None = None) -> Adapter:
        """Return the carried directions, applied as the native ones are."""
        donor = self.linked().donor
        facts = {"made_by": "carry_directions", "donor": donor.model.id, "prompts": donor.prompts}
        return replace(self._applied(self._carried(link), self.kind), provenance=facts)

    def published(self) -> Adapter:
        """Return the directions through the published converters, at the layers of the setting.

        The published method is of adapters. Of directions there is one for every layer, so that a map of layers under
        which several meet would add them up.
        """
        return self.pasted(as_published(self.linked()))

    def fidelity(self) -> list[dict[str, float]]:
        """Return by layer the cosine of the carried direction to the recipient's own.

        Each dimension is in units of its standard deviation in the recipient's last-token rows, so that a few
        giant ones do not decide; `n` counts these rows.
        """
        donor, recipient = self.linked().donor, self.linked().recipient
        ends = torch.from_numpy(recipient.keys[:, 1] == END)
        carried, rows = self._carried(), []
        for pair in self.match(donor, recipient, range(donor.n_layers)):
            if pair.recipient in carried:
                spread = recipient.layer(pair.recipient)[ends].double().std(0).clamp(min=1e-12)
                ours, own = (v[pair.recipient].double() / spread for v in (carried, self.native))
                cosine = torch.cosine_similarity(ours, own, dim=0)
                rows.append({**pair._asdict(), "n": float(ends.sum()), "native_cosine": float(cosine)})
        return rows

    def random(self, *, in_span: bool = False) -> Adapter:
        """Return random directions, each as long as the carried one, applied in its place; see `Material.random`."""
        carried, within = self._carried(), self.linked().recipient if in_span else None
        drawn = random_like(self._applied(carried, "add", 1.0), self.seed, within=within)
        found = {layer: many[0].writes[0] for layer, many in drawn.interventions.items()}
        return self._applied({layer: v / v.norm() * carried[layer].norm() for layer, v in found.items()}, self.kind)

    def mean_ablation(self) -> Adapter:
        """Return what gives every state the mean's part along the carried direction."""
        return self._applied(self._carried(), "mean-ablate", 1.0)

    def _carried(self, link: Link | None = None) -> dict[int, Tensor]:
        return carry_directions(
            self.directions, link or self.linked(), match=self.match, layers=self.setting.layers, rescale=self.rescale
        )

    def _applied(self, directions: Mapping[int, Tensor], kind: str, strength: float | None = None) -> Adapter:
        amount, typical = self.strength if strength is None else strength, self.linked().recipient
        return from_directions(
            directions, typical.model, kind=kind, strength=amount, at=self.at, typical=typical, name=self.adapter.name
        )
