"""The stages of a transfer and about how long each takes here, told before it starts, and its progress."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from commandv.evaluation.arms import ARMS, BRIDGE_PROMPTS, DEMONSTRATIONS, PASTED, PRACTICE_SETTINGS
from commandv.evaluation.material import ANSWER_TOKENS
from commandv.evaluation.price import REPLY_TOKENS
from commandv.evaluation.transferring.job import Job
from commandv.evaluation.transferring.parts import Parts
from commandv.models.encoding import encode
from commandv.models.generation import generate
from commandv.models.lm import LM
from commandv.progress import track
from commandv.prompts.sets import PromptSet

JUDGE = "judge of likeness"
PROBED, PROBE_TOKENS, PROBES = 8, 6, 3  # prompts, tokens of the answers whose time is taken, and turns
# About how many forward passes over all prompts with answers a method takes, as timed on the packaged models: turns
# that prompts share are read once.
PASSES = {"context": 3, "vocabulary": 11, "answers": 6}
TRAINING = 3.5  # forward passes that one of training with its backward pass costs
CHARACTERS = 4  # a token, of plain text
FLOPS = 1e10  # a second, of the closed forms

log = logging.getLogger(__name__)


class Stage(NamedTuple):
    """One stage: its name and expected seconds, 0 where it was finished before."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a transfer will do."""

    stages: tuple[Stage, ...]  # in their order

    @property
    def seconds(self) -> float:
        """Expected in all."""
        return sum(one.seconds for one in self.stages)


class Speed(NamedTuple):
    """Of one model here: seconds to read a token of a prompt, and to write one of an answer."""

    read: float
    write: float


def speed(lm: LM, prompts: PromptSet) -> Speed:
    """Measure how fast a model reads and writes, by short answers to a few prompts.

    The least of some turns counts: other work on the machine, and what is slow the first time only, can but add.
    """
    few = prompts[:PROBED]
    taken = []
    for tokens in (1, PROBE_TOKENS):
        turns = []
        for _ in range(PROBES):
            began = time.perf_counter()
            generate(lm, few, max_new_tokens=tokens, batch_size=PROBED)
            turns.append(time.perf_counter() - began)
        taken.append(min(turns))
    read = sum(len(encode(lm, one).ids) for one in few.texts)
    write = max(taken[1] - taken[0], 0.05 * taken[1]) / ((PROBE_TOKENS - 1) * len(few))
    return Speed(taken[0] / read, write)


def plan(job: Job) -> Plan:
    """Return the stages of a prepared transfer with their expected seconds, from a quick look at both models' speed."""
    donor, recipient = speed(job.donor, job.dev), speed(job.recipient, job.dev)
    parts, settings = Parts(job.folder, job.content), job.settings
    length = ANSWER_TOKENS if job.task is None else job.task.max_new_tokens
    sizes = {
        name: _tokens(job.recipient, prompts)
        for name, prompts in (("dev", job.dev), ("test", job.test), ("asked", job.asked), ("prompts", job.prompts))
    }
    n = {"dev": len(job.dev), "test": len(job.test), "asked": len(job.asked)}

    def answers(split: str, how: Speed, tokens: int = length) -> float:
        return sizes[split] * how.read + n[split] * tokens * how.write

    price = _tokens(job.recipient, job.passages) + REPLY_TOKENS * len(job.passages)
    stages = []
    if job.task is None:
        stages.append(Stage(JUDGE, answers("asked", recipient) + 2 * answers("asked", donor)))
    stages.append(Stage("donor", 2 * answers("dev", donor)))
    text = sum(len(one.response or one.text) for one in job.text) / CHARACTERS
    read = (sizes["prompts"] + text) * (donor.read + recipient.read)
    stages.append(Stage("profiles", 0 if parts.profiled() else read))
    shown = answers("asked", donor, ANSWER_TOKENS) + 2 * (sizes["asked"] + n["asked"] * ANSWER_TOKENS) * donor.read
    stages.append(Stage("donor's answers", 0 if parts.has("demonstrations") else shown))
    whole = (sizes["asked"] + n["asked"] * ANSWER_TOKENS) * recipient.read
    for name in job.arms:
        by = ARMS[name].by
        stages.append(Stage(f"fit: {by}", 0 if parts.has(name) else _fit(job, name, whole)))
        left = [one for one in settings.grid(name) if not parts.has_result(f"tried {name}", job.dev.hash, asdict(one))]
        stages.append(Stage(f"tune: {by}", len(left) * (answers("dev", recipient) + price * recipient.read)))
    turns = DEMONSTRATIONS * (sizes["asked"] / max(1, n["asked"]) + ANSWER_TOKENS)
    tested = 4 * (answers("test", recipient) + price * recipient.read) + answers("test", donor)
    tested += n["test"] * turns * recipient.read + (price + turns) * recipient.read
    stages.append(Stage("test prompts", tested))
    return Plan(tuple(one._replace(seconds=round(one.seconds, 1)) for one in stages))


def _tokens(lm: LM, prompts: PromptSet) -> float:
    """Return about how many tokens the prompts have, from a few of them."""
    few = prompts.texts[:: max(1, len(prompts) // BRIDGE_PROMPTS)]
    return len(prompts) * sum(len(encode(lm, one).ids) for one in few) / len(few)


def _fit(job: Job, name: str, whole: float) -> float:
    """Return the expected seconds of a method's fit; `whole` are those of reading all prompts with their answers."""
    if name == PASTED:
        # A factorisation on each side of each layer, of the smaller of rows and width.
        widths = (job.donor.d_model, job.recipient.d_model)
        return sum(10 * width**3 for width in widths) * job.recipient.n_layers / 3 / FLOPS
    if ARMS[name].epochs:
        return TRAINING * PRACTICE_SETTINGS.epochs * whole
    return PASSES[ARMS[name].by] * whole


@dataclass
class Stages:
    """Tells which stage runs, how long it should take, and keeps how long it took."""

    plan: Plan
    taken: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Stages:
        self._stack = contextlib.ExitStack()
        self._advance = self._stack.enter_context(track("transfer", total=max(1, round(self.plan.seconds))))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a stage; one within another counts for the other."""
        expected = next((one.seconds for one in self.plan.stages if one.name == name), 0.0)
        log.info("%s: about %.0f s", name, expected)
        began, before = time.monotonic(), sum(self.taken.values())
        try:
            yield
        finally:
            within = sum(self.taken.values()) - before
            self.taken[name] = self.taken.get(name, 0.0) + time.monotonic() - began - within
            self._advance(round(expected))
