"""The choice and its controls on the test prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from commandv.adapters.adapter import Adapter
from commandv.errors import InputError
from commandv.evaluation.arms import FEW_SHOT, IN_SPAN, PASTED, SHUFFLED, UNMODIFIED, Made, make_arm
from commandv.evaluation.material import Material
from commandv.evaluation.meter import Meter
from commandv.evaluation.results import Arm, recorded
from commandv.evaluation.transferring.job import Job
from commandv.evaluation.transferring.parts import Parts
from commandv.evaluation.tuning import Setting
from commandv.evaluation.verdicts import DONOR
from commandv.prompts.sets import PromptSet

DRAWS = 4  # of the random control: a single one may happen to do what is looked for


def tested(
    job: Job,
    parts: Parts,
    meter: Meter,
    material: Material,
    name: str,
    adapter: Adapter,
    setting: Setting,
    missing: dict[str, str],
) -> list[Arm]:
    """Measure the choice, its controls and the donor.

    Args:
        job: what is done.
        parts: what was finished before.
        meter: of the recipient and the task.
        material: what arms are made of.
        name: the arm that was chosen.
        adapter: its adapter, scaled as chosen.
        setting: the one chosen.
        missing: gets the reason of each control that cannot be made.

    Raises:
        InputError: the choice or the unmodified recipient cannot be measured.
    """
    task = meter.tasks[0]
    like = replace(material, setting=setting, mirrored=adapter)

    def once(arm: str, make: Callable[[], Made], shown: Setting = setting) -> Callable[[], Arm]:
        def measured() -> Arm:
            made = make()
            return recorded(arm, meter.measured(made), made, shown)

        return measured

    makers = {
        UNMODIFIED: once(UNMODIFIED, Made, Setting()),
        name: once(name, lambda: Made(adapter)),
        IN_SPAN: lambda: _drawn(meter, like),
        FEW_SHOT: once(FEW_SHOT, lambda: make_arm(FEW_SHOT, like), Setting()),
    }
    if name == PASTED:
        makers[SHUFFLED] = once(SHUFFLED, lambda: _scaled(make_arm(SHUFFLED, like), setting.scale))
    found = []
    for arm, make in makers.items():
        try:
            found.append(parts.result(Arm, make, f"tested {arm}", task.test.hash, name, asdict(setting)))
        except InputError as error:
            if arm in (UNMODIFIED, name):
                raise
            missing[arm] = str(error)
    return [*found, parts.result(Arm, lambda: _donor(job, meter), "tested donor", task.test.hash)]


def _drawn(meter: Meter, material: Material) -> Arm:
    """Measure random directions, another draw for each of several shares of the prompts and of the passages."""
    task, passages, draws = meter.tasks[0], meter.passages, []
    n = min(DRAWS, len(task.test), len(passages))
    for draw in range(n):
        share = replace(task, test=PromptSet(task.test.prompts[draw::n], task.test.name))
        text = PromptSet(passages.prompts[draw::n], passages.name)
        part = Meter(meter.lm, [share], passages=text, batch_size=meter.batch_size)
        part.reference = meter.reference[draw::n]
        made = make_arm(IN_SPAN, replace(material, seed=material.seed + draw))
        draws.append(recorded(IN_SPAN, part.measured(made), made, material.setting))

    def joined(parts: Sequence[Sequence[Any]]) -> list[Any]:
        out: list[Any] = [None] * sum(map(len, parts))
        for draw, one in enumerate(parts):
            out[draw::n] = one
        return out

    whole: dict[str, Any] = {
        which: {task.name: joined([getattr(one, which)[task.name] for one in draws])}
        for which in ("labels", "loops", "words")
    }
    whole["price"] = {name: joined([one.price[name] for one in draws]) for name in draws[0].price}
    return draws[0].model_copy(update={**whole, "seconds": sum(one.seconds for one in draws)})


def _donor(job: Job, meter: Meter) -> Arm:
    """Measure the donor with its adapter; what that costs the donor is not the question."""
    theirs = Meter(job.donor, meter.tasks, passages=job.passages[:1], batch_size=meter.batch_size)
    own = Made(job.adapter)
    return recorded(DONOR, theirs.measured(own), own).model_copy(update={"price": {}})


def _scaled(made: Made, scale: float) -> Made:
    assert made.adapter is not None
    return replace(made, adapter=made.adapter.scaled(scale))
