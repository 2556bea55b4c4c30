"""One cell: choose strengths, make every arm, measure them all on the test split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.errors import InputError
from commandv.evaluation.calibration import Setting
from commandv.evaluation.controls import ARMS, PASTED, arms_without
from commandv.evaluation.material import DirectionMaterial, Material
from commandv.evaluation.results import Arm, Cell, Point, Sample
from commandv.evaluation.study.parts import Method
from commandv.evaluation.study.schema import CellSpec
from commandv.evaluation.study.shared import Shared, points
from commandv.models.generation import generate
from commandv.positions import as_positions
from commandv.transfer.convert import FITTERS
from commandv.transfer.match import MATCHERS

CALIBRATED = (PASTED, "pinv", "text-bridge")  # arms whose strength is chosen; the others mirror the pasted one
# A vector's length is arbitrary: a random one at the strength that suits ours would flatter ours.
CALIBRATED_VECTORS = (*CALIBRATED, "random")
FULL_STRENGTH = ("mean-ablation", "direct")
N_SAMPLES, SAMPLE_TOKENS = 3, 40


def run_cell(shared: Shared, spec: CellSpec, identity: Mapping[str, Any]) -> Cell:
    """Return a cell's result; `identity` are its own fields and settings."""
    return _CellRun(shared, spec).run(identity)


class _CellRun:
    def __init__(self, shared: Shared, spec: CellSpec) -> None:
        self.shared, self.spec, self.study = shared, spec, shared.study
        self.vector = self.study.behaviours[spec.behaviour].vector
        self.tasks = shared.tasks(spec.behaviour)
        self.recipient = shared.models[spec.recipient]
        self.material = self._material()

    def _material(self) -> Material:
        shared, (donor, recipient, behaviour, seed) = self.shared, self.spec
        common: dict[str, Any] = {
            "donor": shared.profiled(donor),
            "recipient": shared.profiled(recipient),
            "donor_lm": shared.models[donor],
            "recipient_lm": self.recipient,
            "prompts": self.study.profile_prompts(),
            "layers": self.study.layers[0],
            "seed": seed,
        }
        if self.vector is not None:
            return DirectionMaterial(
                adapter=shared.native(behaviour, donor, seed).adapter,
                directions=shared.directions(behaviour, donor, seed),
                native=shared.directions(behaviour, recipient, seed),
                kind=self.vector.kind,
                strength=self.vector.strength,
                at=as_positions(self.vector.at),
                rescale=self.vector.rescale,
                write_rows=self.vector.rows,
                **common,
            )
        adapter = shared.adapter(behaviour, donor, seed)
        if adapter is None:
            raise InputError(f"behaviour {behaviour}: no adapter for the donor {donor}")
        direct = None if "direct" in self.study.leave_out else shared.adapter(behaviour, recipient, seed)
        return Material(adapter=adapter, direct=direct, **common)

    def run(self, identity: Mapping[str, Any]) -> Cell:
        """Return the cell's result."""
        _, recipient, behaviour, seed = self.spec
        chosen, curve = self._calibrated()
        settings = chosen[PASTED]
        self.material = replace(self.material, layers=settings.layers)
        arms = [self.shared.unmodified(behaviour, recipient)]
        made: dict[str, Adapter] = {}
        for name, make in arms_without(self.study.leave_out).items():
            if name == "direct" and self.vector is not None:
                native = self.shared.native(behaviour, recipient, seed)
                arms.append(native.arm)
                curve += native.curve
                continue
            pick = chosen.get(name, settings)
            made[name] = make(replace(self.material, layers=pick.layers, published_layers=pick.layers))
            arms.append(self._measured(name, made[name], 1.0 if name in FULL_STRENGTH else pick.scale))
        fits = {PASTED: self.material.fidelity()}
        for name, method in self.study.methods.items():
            material = self._by(method, settings.layers)
            arms.append(self._measured(name, material.pasted(), settings.scale))
            # On part of the prompts others are held out, and the figures would not compare.
            fits[name] = [] if method.prompts else material.fidelity()
        arms.append(self._donor())
        success = {task.name: task.success for task in self.tasks}
        return Cell(
            **{**identity, "settings": {**identity["settings"], "success": success}},
            arms=arms,
            curve=curve,
            fidelity=fits,
            samples=self._samples(made[PASTED], settings.scale),
        )

    def _calibrated(self) -> tuple[dict[str, Setting], list[Point]]:
        """Choose the strength of the arms that have one, each with the same choice."""
        chosen, curve = {}, []
        for name in CALIBRATED_VECTORS if self.vector else CALIBRATED:
            if name in self.study.leave_out:
                continue

            def make(layers: str, name: str = name) -> Adapter:
                return ARMS[name](replace(self.material, layers=layers, published_layers=layers))

            found = self.shared.calibrated(self.spec.recipient, self.spec.behaviour, make)
            chosen[name] = found.chosen
            curve += points(name, found)
        return chosen, curve

    def _measured(self, method: str, adapter: Adapter, scale: float) -> Arm:
        _, recipient, behaviour, _ = self.spec
        return self.shared.measured(method, recipient, behaviour, adapter, scale)

    def _donor(self) -> Arm:
        donor, _, behaviour, seed = self.spec
        if self.vector is not None:
            return self.shared.native(behaviour, donor, seed).arm.model_copy(update={"method": "donor"})
        return self.shared.measured("donor", donor, behaviour, self.material.adapter)

    def _by(self, method: Method, layers: str) -> Material:
        """Return the material with a method of the study in the place of the default."""
        material = replace(self.material, fit=FITTERS[method.fit](), layers=method.layers or layers)
        if method.prompts is not None:
            material = replace(
                material,
                donor=material.donor.first(method.prompts),
                recipient=material.recipient.first(method.prompts),
            )
        if method.match is not None:
            material = replace(material, match=MATCHERS[method.match])
        rows = method.write_rows or material.write_rows
        return replace(material, read_rows=method.read_rows, write_rows=rows)

    def _samples(self, adapter: Adapter, scale: float) -> list[Sample]:
        if not self.tasks[0].keep_answers:
            return []
        prompts = self.tasks[0].test.texts[:N_SAMPLES]
        before = generate(self.recipient, prompts, max_new_tokens=SAMPLE_TOKENS)
        with attach(self.recipient, adapter, scale=scale):
            after = generate(self.recipient, prompts, max_new_tokens=SAMPLE_TOKENS)
        return [Sample(prompt=a, before=b, after=c) for a, b, c in zip(prompts, before, after, strict=True)]
