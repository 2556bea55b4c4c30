"""Running a transfer: fit by every method, choose on development prompts, measure the choice beside its controls."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from commandv.adapters.adapter import Adapter
from commandv.adapters.store import read, save
from commandv.arguments import checked
from commandv.errors import CommandVError, InputError
from commandv.evaluation import material
from commandv.evaluation.arms import ARMS, FEW_SHOT, IN_SPAN, PASTED, SHUFFLED, UNMODIFIED, Made, make_arm
from commandv.evaluation.likeness import Answers, answers, likeness
from commandv.evaluation.material import Material
from commandv.evaluation.meter import Meter
from commandv.evaluation.outcomes import measure
from commandv.evaluation.results import Arm, Attempt, recorded
from commandv.evaluation.scores import pooled
from commandv.evaluation.statistics import difference
from commandv.evaluation.tasks import Task
from commandv.evaluation.transferring.certificate import Transferred, certified
from commandv.evaluation.transferring.job import Job, TransferSettings, prepare
from commandv.evaluation.transferring.parts import Parts
from commandv.evaluation.transferring.planning import JUDGE, Plan, Stages, plan
from commandv.evaluation.tuning import Setting, Tried, Tuned, attempt, choose
from commandv.evaluation.verdicts import DONOR
from commandv.models.lm import LM
from commandv.profiles.profiling import profile
from commandv.prompts.sets import PromptSet
from commandv.storage.kinds import ADAPTER, DEMONSTRATIONS
from commandv.transfer.distil.demonstrations import load_demonstrations, save_demonstrations
from commandv.transfer.link import Link, link

DRAWS = 4  # of the random control: a single one may happen to do what is looked for

log = logging.getLogger(__name__)


@checked
def transfer_adapter(
    donor: LM,
    adapter: Adapter,
    recipient: LM,
    task: Task | str | None = None,
    settings: TransferSettings = TransferSettings(),
) -> Transferred:
    """Carry a donor's adapter into a recipient by every method that applies, and measure whether it arrived.

    Method, layers and scale are chosen on development prompts within a budget of price; the choice is then measured on
    test prompts, which no fit and no choice has seen, beside the unmodified recipient, random directions within the
    recipient's activations, the same fit on wrongly paired prompts (of what is carried by activations) and a few-shot
    prompt of the donor's answers. What is finished is kept in the cache directory by its content, so that a run that
    was cut off goes on where it was.

    Args:
        donor: the model that the adapter is for, with nothing attached.
        adapter: the behaviour.
        recipient: the model to carry it into, with nothing attached.
        task: what is asked and how answers count: a name that `load_task` knows, or a task of your own. None compares
            with the donor's own answers, with its adapter and without; see `like_the_donor`.
        settings: methods, what is tried, budgets, judge, prompts and their numbers.

    Returns:
        The recipient's adapter, scaled as chosen, with its certificate in its provenance; see `Transferred`.

    Raises:
        InputError: the donor does not show the behaviour with its adapter, donor and recipient are one model, an
            unknown task or method, or no method that applies.
        MismatchError: the adapter is not the donor's.
    """
    return run(prepare(donor, adapter, recipient, task, settings))


def run(job: Job, planned: Plan | None = None) -> Transferred:
    """Run a prepared transfer; errors as in `transfer_adapter`."""
    with Stages(planned or plan(job)) as stages:
        return _Run(job, stages).run()


@dataclass(frozen=True)
class _Candidate:
    """A method's best setting."""

    arm: str
    adapter: Callable[[Setting], Adapter]
    tuned: Tuned


class _Run:
    """What the stages of one run share; each is made when first asked for."""

    def __init__(self, job: Job, stages: Stages) -> None:
        self.job, self.stages = job, stages
        self.parts = Parts(job.folder, job.content)
        self.missing: dict[str, str] = {}

    def run(self) -> Transferred:
        job = self.job
        donors = self._donor_shows_it()
        _ = self.material  # now, so that its stages are not those of the first method's fit
        base = self._tried(Setting(), None, UNMODIFIED)
        found = [one for name in job.arms if (one := self._candidate(name, base)) is not None]
        if not found:
            raise InputError(
                f"{job.adapter.name} cannot be carried into {job.recipient.id}: "
                + "; ".join(f"{name}: {why}" for name, why in self.missing.items())
            )
        best = choose(
            [one.tuned.chosen for one in found], self.task.success,
            [one.tuned.chosen for one in found if one.tuned.within_budget],
        ).chosen  # fmt: skip
        winner = next(one for one in found if one.tuned.chosen is best)
        adapter = winner.adapter(best.setting).scaled(best.setting.scale)
        after = self._tried(best.setting, winner.adapter, winner.arm)
        with self.stages("test prompts"):
            arms = self._tested(winner.arm, adapter, best.setting)
        return certified(
            job, self.task, adapter, winner.arm, arms,
            base=base, after=after, donors=donors, tried={one.arm: one.tuned for one in found}, missing=self.missing,
            seconds=self.stages.taken,
        )  # fmt: skip

    # -- what is shared -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def task(self) -> Task:
        """The task; without one, that of being like the donor with its adapter."""
        job = self.job
        if job.task is not None:
            return job.task
        with self.stages(JUDGE):
            found = self.parts.result(
                Answers,
                lambda: answers(
                    job.donor, job.adapter, job.recipient, job.asked, max_new_tokens=material.ANSWER_TOKENS,
                    batch_size=job.settings.batch_size,
                ),
                "answers",
            )  # fmt: skip
            judge = likeness(found.changed, found.plain, found.own, job.adapter.name)
        return Task("like the donor", job.dev, job.test, judge, max_new_tokens=material.ANSWER_TOKENS)

    @functools.cached_property
    def meter(self) -> Meter:
        job = self.job
        return Meter(job.recipient, [self.task], passages=job.passages, batch_size=job.settings.batch_size)

    @functools.cached_property
    def link(self) -> Link:
        job = self.job
        with self.stages("profiles"):
            donor, recipient = (profile(lm, job.prompts, text=job.text) for lm in (job.donor, job.recipient))
            self.parts.note((donor, recipient))
            return link(donor, recipient)

    @functools.cached_property
    def material(self) -> Material:
        """What arms are made of; the donor's answers are made or read where an arm learns from them."""
        job = self.job
        bare = Material(
            adapter=job.adapter, link=self.link, donor_lm=job.donor, recipient_lm=job.recipient, prompts=job.prompts,
            asked=job.asked, keep=job.keep, seed=job.settings.seed,
        )  # fmt: skip
        with self.stages("donor's answers"):
            try:
                shown = self.parts.directory(
                    "demonstrations", DEMONSTRATIONS, load_demonstrations, save_demonstrations, bare.demonstrations
                )
                return replace(bare, shown=shown)
            except InputError as error:  # none that may be kept; what is carried by activations needs none
                log.warning("%s", error)
                self.missing["donor's answers"] = str(error)
                return replace(bare, asked=None)

    # -- stages -------------------------------------------------------------------------------------------------------

    def _donor_shows_it(self) -> dict[str, Arm]:
        """Return the donor without and with its adapter on the development prompts."""
        job, task = self.job, self.task
        meter = Meter(job.donor, [replace(task, test=task.dev, dev=task.test)], passages=job.passages[:1],
                      batch_size=job.settings.batch_size)  # fmt: skip

        def shown(name: str, adapter: Adapter | None) -> Arm:
            return self.parts.result(Arm, lambda: _measured(name, meter, Made(adapter)), f"donor {name}", task.dev.hash)

        with self.stages("donor"):
            found = {"without": shown("without", None), "with": shown("with", job.adapter)}
        without, with_it = ([found[name].labels[task.name]] for name in ("without", "with"))
        gap = difference("gain", with_it, without, task.judge.unit)
        toward = 1 if task.success == "more" else -1
        rates = [pooled(name, one, task.judge.unit).value for name, one in (("with", with_it), ("without", without))]
        told = f"{rates[0]:.2f} with its adapter {job.adapter.name}, {rates[1]:.2f} without, on {gap.n} prompts"
        if toward * gap.value <= 0:
            raise InputError(
                f"the donor {job.donor.id} does not show the behaviour of {task.name} ({told}; {task.success} is the "
                "aim): there is nothing to carry. Look at its answers with `commandv generate --adapter`, or measure "
                "by another task"
            )
        if min(toward * gap.low, toward * gap.high) <= 0:
            log.warning("the donor %s hardly shows the behaviour of %s: %s", job.donor.id, task.name, told)
        return found

    def _candidate(self, name: str, base: Attempt) -> _Candidate | None:
        """Fit by one method and try its settings; None, with the reason in `missing`, where it does not apply."""
        job, task = self.job, self.task
        try:
            with self.stages(f"fit: {ARMS[name].by}"):
                make = self._maker(name)
                make(job.settings.grid(name)[0])
        except CommandVError as error:
            log.warning("%s does not apply: %s", ARMS[name].by, error)
            self.missing[ARMS[name].by] = str(error)
            return None
        tried: list[Tried] = []
        with self.stages(f"tune: {ARMS[name].by}"):
            for setting in job.settings.grid(name):
                tried.append(self._tried(setting, make, name).tried)
        limit = job.settings.most_loops
        most = None if limit is None else (base.tried.loops or 0.0) + limit
        return _Candidate(name, make, choose(tried, task.success, budget=job.settings.budget, most_loops=most))

    def _maker(self, name: str) -> Callable[[Setting], Adapter]:
        """Return what makes an arm's adapter at a setting; what does not depend on the setting is made once."""
        if name == PASTED:

            @functools.cache
            def at(layers: str) -> Adapter:
                return _adapter(name, replace(self.material, setting=Setting(layers)))

            return lambda setting: at(setting.layers)
        kept = self.parts.directory(name, ADAPTER, read, save, lambda: _adapter(name, self.material))
        return lambda _setting: kept

    def _tried(self, setting: Setting, make: Callable[[Setting], Adapter] | None, name: str) -> Attempt:
        """Return a setting on the development prompts; without an adapter, the unmodified recipient."""
        job, task = self.job, self.task

        def tried() -> Attempt:
            if make is None:
                found = measure(job.recipient, task, split="dev", batch_size=job.settings.batch_size)
                one = Tried(setting, found.score().value, 0.0, loops=found.loop_rate().value)
            else:
                one, found = attempt(
                    job.recipient, task, make(setting), setting, passages=job.passages, reference=self.meter.reference,
                    batch_size=job.settings.batch_size,
                )  # fmt: skip
            labels = [None if math.isnan(label) else label for label in found.labels]
            return Attempt(tried=one, labels=labels, answers=list(found.answers))

        return self.parts.result(Attempt, tried, f"tried {name}", task.dev.hash, asdict(setting))

    # -- on the test prompts ------------------------------------------------------------------------------------------

    def _tested(self, name: str, adapter: Adapter, setting: Setting) -> list[Arm]:
        """Measure the choice, its controls and the donor; why a control cannot be made goes to `missing`.

        Raises:
            InputError: the choice or the unmodified recipient cannot be measured.
        """
        job, meter, task = self.job, self.meter, self.task
        like = replace(self.material, setting=setting, mirrored=adapter)
        makers: dict[str, Callable[[], Arm]] = {
            UNMODIFIED: lambda: _measured(UNMODIFIED, meter, Made()),
            name: lambda: _measured(name, meter, Made(adapter), setting),
            IN_SPAN: lambda: _drawn(meter, like),
            FEW_SHOT: lambda: _measured(FEW_SHOT, meter, make_arm(FEW_SHOT, like)),
        }
        if name == PASTED:
            makers[SHUFFLED] = lambda: _measured(SHUFFLED, meter, _scaled(make_arm(SHUFFLED, like), setting), setting)
        found = []
        for arm, make in makers.items():
            try:
                found.append(self.parts.result(Arm, make, f"tested {arm}", task.test.hash, name, asdict(setting)))
            except InputError as error:
                if arm in (UNMODIFIED, name):
                    raise
                self.missing[arm] = str(error)
        theirs = Meter(job.donor, meter.tasks, passages=job.passages[:1], batch_size=meter.batch_size)
        donor = self.parts.result(
            Arm, lambda: _measured(DONOR, theirs, Made(job.adapter)), "tested donor", task.test.hash
        )
        return [*found, donor.model_copy(update={"price": {}})]  # what its adapter costs the donor is not the question


def _adapter(name: str, material: Material) -> Adapter:
    made = make_arm(name, material).adapter
    assert made is not None
    return made


def _scaled(made: Made, setting: Setting) -> Made:
    assert made.adapter is not None
    return replace(made, adapter=made.adapter.scaled(setting.scale))


def _measured(name: str, meter: Meter, made: Made, setting: Setting = Setting()) -> Arm:
    return recorded(name, meter.measured(made), made, setting)


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
        draws.append(_measured(IN_SPAN, part, made, material.setting))

    def joined(parts: list[list[Any]]) -> list[Any]:
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
