"""One cell: choose strengths, make every arm, measure them all on the test split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.errors import InputError
from commandv.evaluation.arms import DIRECT, PASTED, RANDOM, UNMODIFIED, Arm, Made, make_arm
from commandv.evaluation.material import DirectionMaterial, Material
from commandv.evaluation.results import Arm as Result, Cell, Sample
from commandv.evaluation.study.kept import answers_key
from commandv.evaluation.study.parts import Method
from commandv.evaluation.study.schema import CellSpec
from commandv.evaluation.study.shared import Shared
from commandv.evaluation.tuning import Setting, Tried
from commandv.evaluation.verdicts import DONOR
from commandv.models.generation import generate
from commandv.positions import as_positions
from commandv.prompts.sets import load_prompts
from commandv.transfer.convert.table import FITTERS
from commandv.transfer.link import link
from commandv.transfer.match import MATCHERS

N_ASKED = 128  # prompts of the behaviour that the donor answers, for arms that learn from its answers
N_SAMPLES, SAMPLE_TOKENS = 3, 40


def is_tuned(name: str, arm: Arm, vector: bool) -> bool:
    """Tell whether an arm's strength is chosen.

    A vector's length is arbitrary: a random one at the strength that suits ours would flatter ours.
    """
    return arm.strength == "tuned" or (vector and (name == DIRECT or name.startswith(RANDOM)))


class CellRun:
    """The run of one cell; `identity` are its own fields and settings."""

    def __init__(self, shared: Shared, spec: CellSpec, identity: Mapping[str, Any]) -> None:
        self.identity = identity
        self.content = {key: value for key, value in identity["settings"].items() if key != "content"}
        self.shared, self.spec, self.study = shared, spec, shared.study
        self.vector = self.study.behaviours[spec.behaviour].vector
        self.tasks = shared.tasks(spec.behaviour)
        self.recipient = shared.models[spec.recipient]
        self.material = self._material()

    def _material(self) -> Material:
        shared, (donor, recipient, behaviour, seed) = self.shared, self.spec
        vector, examples = self.vector, self.study.behaviours[behaviour].examples
        profiles = shared.profiled(donor), shared.profiled(recipient)
        common: dict[str, Any] = {
            "link": link(*profiles) if vector is None else link(*profiles, write_rows=vector.rows),
            "donor_lm": shared.models[donor],
            "recipient_lm": self.recipient,
            "prompts": self.study.profile_prompts(),
            # What the donor was trained on, or else the development split.
            "asked": self.tasks[0].dev if examples is None else load_prompts(examples)[:N_ASKED],
            "setting": self.study.settings()[0],
            "seed": seed,
        }
        if vector is not None:
            return DirectionMaterial(
                adapter=shared.native(behaviour, donor, seed).adapter,
                directions=shared.directions(behaviour, donor, seed),
                native=shared.directions(behaviour, recipient, seed),
                kind=vector.kind,
                strength=vector.strength,
                at=as_positions(vector.at),
                rescale=vector.rescale,
                **common,
            )
        adapter = shared.adapter(behaviour, donor, seed)
        if adapter is None:
            raise InputError(f"behaviour {behaviour}: no adapter for the donor {donor}")
        direct = None if DIRECT in self.study.leave_out else shared.adapter(behaviour, recipient, seed)
        return Material(adapter=adapter, direct=direct, **common)

    def run(self) -> Cell:
        """Return the cell's result."""
        _, recipient, behaviour, seed = self.spec
        chosen, curve, missing = self._tuned()
        setting = chosen[PASTED]
        made: dict[str, Callable[[], Made]] = {}
        rows = []
        for name, arm in self.study.arms().items():
            if name == UNMODIFIED:
                rows.append(self.shared.unmodified(behaviour, recipient))
            elif name == DIRECT and self.vector is not None:
                native = self.shared.native(behaviour, recipient, seed)
                rows.append(native.arm)
                curve[name] = native.curve
            elif name not in missing:
                own = chosen.get(name, setting)
                at = replace(own, scale=1.0) if arm.strength == "full" else own
                made[name] = functools.cache(functools.partial(make_arm, name, replace(self.material, setting=own)))
                try:
                    rows.append(self._measured(name, made[name], at))
                except InputError as error:
                    if name == PASTED:
                        raise
                    missing[name] = str(error)
        self.material = replace(self.material, setting=setting)
        fits = {PASTED: self.material.fidelity()}
        for name, method in self.study.methods.items():
            material = self._by(method)

            def pasted(material: Material = material) -> Made:
                return Made(material.pasted())

            rows.append(self._measured(name, pasted, material.setting))
            # On part of the prompts others are held out, and the figures would not compare.
            fits[name] = [] if method.prompts else material.fidelity()
        rows.append(self._donor())
        success = {task.name: task.success for task in self.tasks}
        return Cell(
            **{**self.identity, "settings": {**self.identity["settings"], "success": success}},
            arms=rows,
            curve=curve,
            missing=missing,
            fidelity=fits,
            samples=self._samples(made[PASTED]().adapter, setting.scale),
        )

    def _tuned(self) -> tuple[dict[str, Setting], dict[str, list[Tried]], dict[str, str]]:
        """Choose the setting of the arms that have one, each with the same choice; tell which cannot be made."""
        chosen, curve, missing = {}, {}, {}
        for name, arm in self.study.arms().items():
            if not is_tuned(name, arm, self.vector is not None) or name == DIRECT:
                continue

            def make(setting: Setting, name: str = name) -> Adapter:
                adapter = make_arm(name, replace(self.material, setting=setting)).adapter
                assert adapter is not None
                return adapter

            try:
                found = self.shared.tuned(self.spec.recipient, self.spec.behaviour, make)
            except InputError as error:
                if name == PASTED:
                    raise
                missing[name] = str(error)
                continue
            chosen[name], curve[name] = found.chosen.setting, list(found.tried)
        return chosen, curve, missing

    def _measured(self, method: str, make: Callable[[], Made], setting: Setting) -> Result:
        key = answers_key(self.content, method, asdict(setting))
        return self.shared.measured(method, self.spec.recipient, self.spec.behaviour, make, setting, key)

    def _donor(self) -> Result:
        donor, _, behaviour, seed = self.spec
        if self.vector is not None:
            return self.shared.native(behaviour, donor, seed).arm.model_copy(update={"method": DONOR})
        key = answers_key(self.content, DONOR)
        return self.shared.measured(DONOR, donor, behaviour, lambda: Made(self.material.adapter), key=key)

    def _by(self, method: Method) -> Material:
        """Return the material with a method of the study in the place of the default."""
        material = self.material
        old = material.linked()
        new = replace(
            old,
            donor=old.donor.first(method.prompts) if method.prompts else old.donor,
            recipient=old.recipient.first(method.prompts) if method.prompts else old.recipient,
            fit=FITTERS[method.fit](),
            read_rows=method.read_rows,
            write_rows=method.write_rows or old.write_rows,
        )
        setting = replace(material.setting, layers=method.layers or material.setting.layers, rows=None)
        match = material.match if method.match is None else MATCHERS[method.match]
        return replace(material, link=new, setting=setting, match=match)

    def _samples(self, adapter: Adapter | None, scale: float) -> list[Sample]:
        if not self.tasks[0].keep_answers or adapter is None:
            return []
        prompts = self.tasks[0].test.texts[:N_SAMPLES]
        before = generate(self.recipient, prompts, max_new_tokens=SAMPLE_TOKENS)
        with attach(self.recipient, adapter, scale=scale):
            after = generate(self.recipient, prompts, max_new_tokens=SAMPLE_TOKENS)
        return [Sample(prompt=a, before=b, after=c) for a, b, c in zip(prompts, before, after, strict=True)]
