"""What a transfer is to do: models, adapter, task, prompts, methods, budgets; checked before anything is run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from commandv.adapters.adapter import Adapter
from commandv.arguments import checked
from commandv.errors import InputError, MismatchError, require_positive, require_seed
from commandv.evaluation.arms import ARMS, AUTO, methods
from commandv.evaluation.catalogue import load_task
from commandv.evaluation.graders import refusal
from commandv.evaluation.study.shared import fingerprint
from commandv.evaluation.tasks import Judge, Task
from commandv.evaluation.tuning import Setting, grid
from commandv.evaluation.versions import VERSIONS
from commandv.models.identity import ModelRef
from commandv.models.layers import choose_layers
from commandv.models.lm import LM
from commandv.models.state import require_own
from commandv.prompts.sets import Prompt, PromptSet, load_prompts
from commandv.storage.files import cache_dir

BUDGET = 0.5  # nats per token: about what a few-shot prompt of the donor's answers costs
MOST_LOOPS = 0.1  # of answers, above the unmodified recipient
ENOUGH = 48  # prompts of the behaviour, apart from those that settings are chosen on, for the donor to answer
AS_FITTED = "all_layers"  # of the methods that choose their layers themselves


@checked
@dataclass(frozen=True)
class TransferSettings:
    """How a behaviour is carried, chosen and measured.

    Attributes:
        by: `"auto"` for every method that needs no training, or one or several of `activations`, `context`,
            `vocabulary`, `answers`, `training`, separated by commas.
        layers: layer choices that are tried for what is carried by activations.
        scales: factors on the deltas that are tried.
        budget: most drift on benign text, nats per token; None for no limit.
        most_loops: so much larger may the share of looping answers be than the unmodified recipient's; None for no
            limit.
        n_dev: development prompts, on which method, layers and scale are chosen.
        n_test: test prompts, on which the choice and its controls are measured.
        n_asked: prompts that the donor answers.
        seed: of fits and of random controls.
        batch_size: prompts per batch.
        judge: labels the answers in place of the task's judge; without a task, answers to the built-in questions.
        prompts: of the profiles, none of them tested on. Default: `builtin:general`.
        text: passages of the profiles. Default: `builtin:text`.
        asked: prompts that the donor answers for the methods that learn from its answers. Default: development prompts
            of the task, filled up with general ones.
        passages: benign text on which the price is measured. Default: `builtin:drift`.
    """

    by: str = AUTO
    layers: tuple[str, ...] = ("last_third", "last_half")
    scales: tuple[float, ...] = (0.5, 0.75, 1.0)
    budget: float | None = BUDGET
    most_loops: float | None = MOST_LOOPS
    n_dev: int = 24
    n_test: int = 64
    n_asked: int = 128
    seed: int = 0
    batch_size: int = 64
    judge: Judge | None = None
    prompts: PromptSet | None = None
    text: PromptSet | None = None
    asked: PromptSet | None = None
    passages: PromptSet | None = None

    def __post_init__(self) -> None:
        require_seed(self.seed)
        if not self.layers or not self.scales or min(self.scales) <= 0:
            raise InputError(f"layers={self.layers}, scales={self.scales}: expected one or more, scales above 0")
        require_positive(n_dev=self.n_dev, n_test=self.n_test, n_asked=self.n_asked, batch_size=self.batch_size)
        for name in ("budget", "most_loops"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise InputError(f"{name}={value}: expected 0 or more, or None for no limit")
        methods(self.by)

    def grid(self, arm: str) -> list[Setting]:
        """Return what is tried of a method, the weaker first."""
        return grid(self.layers if ARMS[arm].strength == "tuned" else [AS_FITTED], self.scales)


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One transfer, ready to run; see `prepare`."""

    donor: LM  # with nothing attached
    adapter: Adapter  # the donor's
    recipient: LM  # with nothing attached
    task: Task | None  # what is asked and how it counts; None to compare with the donor's own answers
    dev: PromptSet  # prompts to choose on
    test: PromptSet  # prompts to report on
    asked: PromptSet  # prompts that the donor answers
    prompts: PromptSet  # of the profiles
    text: PromptSet  # passages of the profiles
    passages: PromptSet  # benign text on which the price is measured
    settings: TransferSettings  # how
    folder: Path = field(default_factory=lambda: cache_dir() / "transfers")  # where finished parts are kept

    @property
    def arms(self) -> list[str]:
        """Names of the arms that are the methods to try."""
        return methods(self.settings.by)

    @property
    def content(self) -> dict[str, Any]:
        """All that every part of the work depends on; keys of kept parts are made of it."""
        judge = None if self.task is None else (self.task.judge.name, self.task.success, self.task.max_new_tokens)
        sets = {name: getattr(self, name).hash for name in ("asked", "prompts", "text", "passages")}
        return {
            "versions": VERSIONS,
            "donor": asdict(self.donor.ref),
            "recipient": asdict(self.recipient.ref),
            "adapter": fingerprint(self.adapter),
            "judge": judge,
            **sets,
            "seed": self.settings.seed,
        }

    def keep(self, _prompt: Prompt, answer: str) -> bool:
        """Tell whether an answer of the donor may be kept: where answers may be harmful, only a refusal may."""
        return self.task is None or self.task.keep_answers or refusal(answer)


def prepare(
    donor: LM,
    adapter: Adapter,
    recipient: LM,
    task: Task | str | None = None,
    settings: TransferSettings = TransferSettings(),
) -> Job:
    """Check what a transfer needs, and gather it; arguments as in `transfer_adapter`."""
    for lm in (donor, recipient):
        require_own(lm, "a transfer")
    _require_donors(adapter, donor, recipient)
    for choice in settings.layers:
        choose_layers(choice, recipient.n_layers)
    known = load_task(task) if isinstance(task, str) else task
    dev, test = (
        (load_prompts("builtin:questions-dev"), load_prompts("builtin:questions-test"))
        if known is None
        else (known.dev, known.test)
    )
    if (judge := settings.judge) is not None:
        known = Task(judge.name, dev, test, judge) if known is None else replace(known, judge=judge)
    if known is not None:
        known = replace(known, dev=dev[: settings.n_dev], test=test[: settings.n_test])
    general = load_prompts("builtin:general")
    return Job(
        donor=donor,
        adapter=adapter,
        recipient=recipient,
        task=known,
        dev=dev[: settings.n_dev],
        test=test[: settings.n_test],
        asked=_asked(dev, test, general, settings),
        prompts=settings.prompts or general,
        text=settings.text or load_prompts("builtin:text"),
        passages=settings.passages or load_prompts("builtin:drift"),
        settings=settings,
    )


def _require_donors(adapter: Adapter, donor: LM, recipient: LM) -> None:
    """Refuse an adapter that is not the donor's, and a donor that is the recipient."""
    if donor.ref.weights and donor.ref.weights == recipient.ref.weights and _format(donor) == _format(recipient):
        raise InputError(
            f"donor and recipient are the same model ({donor.id}): nothing needs to be carried. Attach the adapter, or "
            "choose its layers and scale anew with `commandv tune`"
        )
    try:
        adapter.model.require(donor.ref, f"adapter {adapter.name}")
    except MismatchError as error:
        try:
            adapter.model.require(recipient.ref, "it")
        except MismatchError:
            raise error from None
        if adapter.model == ModelRef():
            raise
        raise MismatchError(
            f"adapter {adapter.name} is the recipient's own ({recipient.id}), not the donor's ({donor.id}); give the "
            "donor's, or exchange the two models"
        ) from error


def _format(lm: LM) -> tuple[str, str]:
    return lm.ref.template, lm.ref.format


def _asked(dev: PromptSet, test: PromptSet, general: PromptSet, settings: TransferSettings) -> PromptSet:
    """Return those of the settings, or prompts of the behaviour that nothing is chosen on, filled up with general ones.

    Where the behaviour has few, those that settings are chosen on serve as well.
    """
    if settings.asked is not None:
        return _apart(settings.asked, test)[: settings.n_asked]
    rest = dev.prompts[settings.n_dev :]
    own = rest if len(rest) >= ENOUGH else dev.prompts
    # Every few general prompts, not the first: the set goes subject by subject.
    wanted = max(0, settings.n_asked - len(own))
    more = general.prompts[:: max(1, len(general) // max(1, wanted))][:wanted]
    return _apart(PromptSet((*own[: settings.n_asked], *more), "prompts that the donor answers"), test)


def _apart(asked: PromptSet, test: PromptSet) -> PromptSet:
    """Return the prompts that are not tested on."""
    tested = set(test.texts)
    return PromptSet(tuple(one for one in asked if one.text not in tested), asked.name)
