"""The whole way from two models to an adapter that answers, at true width with random weights, and what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.adapters.kinds import direft
from commandv.adapters.store import save
from commandv.errors import InputError
from commandv.evaluation.study.growth import GROWTH, Job, Sizes, Stage, Took, grown
from commandv.evaluation.study.models import STAND_IN, stand_in_tokenizer
from commandv.evaluation.study.parts import ModelSpec, Training
from commandv.evaluation.study.schema import Study
from commandv.evaluation.study.shapes import altered, config_of, random_model, weight_bytes
from commandv.interop.load import load_adapter
from commandv.interop.pyreft import write_pyreft
from commandv.models.generation import generate
from commandv.models.layers import choose_layers
from commandv.models.lm import LM
from commandv.models.load import resolve_dtype, wrap_model
from commandv.profiles.profile import Profile
from commandv.profiles.profiling import profile
from commandv.progress import track
from commandv.prompts.sets import load_prompts
from commandv.storage.foreign import new_directory
from commandv.transfer.link import link
from commandv.transfer.workers import parallel

RESULT = "rehearsal.json"
LARGE = "meta-llama/Llama-3.1-70B"  # width 8192, 80 layers
ANSWERS, TOKENS = 4, 16  # that are generated
ROOM = 0.8  # of the free memory that weights may take
FEWEST = 8


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What was run, and what it took."""

    # name -> id, dtype, d_model; layers, vocabulary and parameters as (run, of the whole model)
    models: dict[str, dict[str, Any]]
    pairs: dict[str, tuple[Stage, ...]]  # "donor -> recipient" -> its stages
    # tokenizer, dtype, device, threads, prompts, rows of either kind, greatest memory of the process
    facts: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        pairs = {name: [one._asdict() for one in stages] for name, stages in self.pairs.items()}
        return {**self.facts, "models": self.models, "pairs": pairs}


def rehearse(
    study: Study,
    *,
    layers: int = 2,
    prompts: int = 32,
    out: Path | str | None = None,
    tokenizer: Any = None,
) -> Rehearsal:
    """Run the pairs of a study from profile to export with random weights of the models' true width, and time it.

    Every stage is run once: build, profile, match, fit, paste, attach, generate, save, load, export. What is carried is
    a random DiReFT of the rank and layers that the study trains, matched in proportion, on all matched layers. Beside
    each figure stands what it comes to at the models' full depth, and between two models of 70 billion parameters
    (width 8192, 80 layers), for the same prompts; see `commandv.evaluation.study.growth` for the formula.

    Args:
        study: whose models and pairs; of the rest only the first behaviour's training is read.
        layers: of each model; the first so many.
        prompts: built-in prompts of the profiles, and as many passages of text.
        out: absent or empty directory to keep the profiles, adapters and figures (`rehearsal.json`) in.
        tokenizer: what the models read with; None for that of a packaged model.

    Raises:
        ModelError: a model's configuration is nowhere to be had.
        InputError: a depth that a model does not have, too few prompts, or models that do not fit into memory.
        FormatError: `out` holds something.
    """
    if prompts < FEWEST:
        raise InputError(f"prompts={prompts}: expected {FEWEST} or more, to fit on and to hold out")
    full = {name: config_of(study.models[name]) for pair in study.pairs for name in pair}
    words = stand_in_tokenizer() if tokenizer is None else tokenizer
    reads = STAND_IN if tokenizer is None else words.name_or_path or type(words).__name__
    narrow = {name: _fitting(study.models[name], config, layers, len(words)) for name, config in full.items()}
    keeping = tempfile.TemporaryDirectory() if out is None else new_directory(Path(out), RESULT)
    with keeping as place:
        made = _Run(study, full, narrow, words, reads, prompts, Path(place)).all()
        (Path(place) / RESULT).write_text(json.dumps(made.as_dict(), indent=1) + "\n", "utf-8")
    return made


def _fitting(spec: ModelSpec, config: Any, layers: int, words: int) -> Any:
    """Return a configuration of so many layers that fits into memory, with fewer words where it must."""
    wide, room = resolve_dtype(spec.dtype).itemsize / 2, ROOM * _free()
    for vocabulary in (max(config.vocab_size, words), words):
        made = altered(config, {"num_hidden_layers": layers, "vocab_size": vocabulary})
        size = wide * weight_bytes(made)
        if size <= room:
            return made
    raise InputError(
        f"layers={layers}: {spec.id} takes {size / 1e9:.1f} GB with so many, {room / 1e9:.1f} GB may be taken here; "
        "give fewer"
    )


def _free() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


class _Clock:
    """What stages took."""

    def __init__(self, device: str, took: dict[str, Took]) -> None:
        self.device, self.took = device, took

    @contextlib.contextmanager
    def stage(self, name: str, size: Callable[[], int | None] = lambda: None) -> Iterator[None]:
        """Keep the seconds of a stage, and the bytes that it leaves."""
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        seconds = time.perf_counter() - began
        self.took[name] = (seconds, size())

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class _Run:
    """A rehearsal's settings; `full` and `narrow` are configurations by model."""

    study: Study
    full: Mapping[str, Any]
    narrow: Mapping[str, Any]
    words: Any
    reads: str
    prompts: int
    place: Path
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def all(self) -> Rehearsal:
        """Run every stage; of the models only one is in memory at a time."""
        profiles, own, pairs = dict[str, Profile](), dict[str, dict[str, Took]](), {}
        with track("rehearse", total=len(self.full) + len(self.study.pairs)) as advance:
            for name in self.full:
                clock = _Clock(self.device, {})
                profiles[name], own[name] = self._profiled(name, clock), clock.took
                advance(1)
            for donor, recipient in self.study.pairs:
                sides = (("donor", donor), ("recipient", recipient))
                took = {f"{stage} {side}": one for side, name in sides for stage, one in own[name].items()}
                clock = _Clock(self.device, took)
                self._carried(clock, (donor, recipient), profiles)
                pairs[f"{donor} -> {recipient}"] = self._told(donor, recipient, took, _rows(profiles[donor]))
                advance(1)
        unit = 1 if sys.platform == "darwin" else 1024
        facts = {
            "study": self.study.name,
            "tokenizer": self.reads,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "prompts": self.prompts,
            "rows": _rows(next(iter(profiles.values()))),
            "most_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        }
        return Rehearsal({name: self._described(name) for name in self.full}, pairs, facts)

    def _described(self, name: str) -> dict[str, Any]:
        run, full, spec = self.narrow[name], self.full[name], self.study.models[name]
        return {
            "id": spec.id,
            "dtype": str(resolve_dtype(spec.dtype)).removeprefix("torch."),
            "d_model": run.hidden_size,
            "layers": (run.num_hidden_layers, full.num_hidden_layers),
            "vocabulary": (run.vocab_size, full.vocab_size),
            "parameters": (weight_bytes(run) // 2, weight_bytes(full) // 2),
        }

    def _model(self, name: str) -> LM:
        spec = self.study.models[name]
        seed = list(self.full).index(name)
        model = random_model(self.narrow[name], resolve_dtype(spec.dtype), self.device, seed)
        return wrap_model(model, self.words, f"{spec.id}, random weights")

    def _profiled(self, name: str, clock: _Clock) -> Profile:
        with clock.stage("build", lambda: sum(one.nbytes for one in lm.model.parameters())):
            lm = self._model(name)
        asked, passages = (load_prompts(f"builtin:{one}", limit=self.prompts) for one in ("general", "text"))
        with clock.stage("profile", lambda: _disk(self.place / f"profile-{name}")):
            return profile(lm, asked, text=passages, cache=self.place / f"profile-{name}")

    def _training(self) -> Training:
        return next((one.training for one in self.study.behaviours.values()), Training())

    def _carried(self, clock: _Clock, names: tuple[str, str], profiles: Mapping[str, Profile]) -> None:
        donor, recipient = (profiles[name] for name in names)
        adapter = _random_adapter(donor, self._training())
        with clock.stage("match"):
            both = link(donor, recipient)
            pairs = both.layer_pairs(adapter.layers, allowed="all_layers")
        with clock.stage("fit", lambda: both.kept.nbytes if both.kept else 0):
            parallel(lambda pair: (both.into(pair), both.back(pair)), pairs)
        with clock.stage("paste", lambda: _size(pasted)):
            pasted = both.paste(adapter, layers="all_layers")
        lm = self._model(names[1])
        _ = lm.ref  # weights are hashed once a model, which is no part of attaching
        with contextlib.ExitStack() as stack:
            with clock.stage("attach"):
                stack.enter_context(attach(lm, pasted))
            with clock.stage("generate"):
                generate(lm, load_prompts("builtin:general", limit=ANSWERS), max_new_tokens=TOKENS)
        folder = self.place / "-".join(names)
        with clock.stage("save", lambda: _disk(folder)):
            save(pasted, folder)
        with clock.stage("load", lambda: _size(again)):
            again = load_adapter(str(folder))
        with clock.stage("export", lambda: _disk(written)):
            written = write_pyreft(again, self.place / f"{folder.name}-pyreft")

    def _told(self, donor: str, recipient: str, took: Mapping[str, Took], rows: Mapping[str, int]) -> tuple[Stage, ...]:
        """Return the stages of a pair with what they come to elsewhere."""

        def job(one: Any, other: Any) -> Job:
            pairs = len(choose_layers(self._training().layers, one.num_hidden_layers))
            return Job(Sizes.of(one), Sizes.of(other), pairs, rows["end"], rows["text"])

        large = config_of(ModelSpec(id=LARGE))
        here, full, there = (
            job(self.narrow[donor], self.narrow[recipient]),
            job(self.full[donor], self.full[recipient]),
            job(large, large),
        )
        return tuple(grown(name, took[name], *map(growth, (here, full, there))) for name, growth in GROWTH.items())


def _random_adapter(donor: Profile, training: Training) -> Adapter:
    """Return a DiReFT of random numbers for a profile's model."""
    rank, d = min(training.rank, donor.d_model), donor.d_model
    generator = torch.Generator().manual_seed(0)
    edits = {}
    for layer in choose_layers(training.layers, donor.n_layers):
        read, rotation = (torch.randn(*shape, generator=generator) / d for shape in ((rank, d), (d, rank)))
        edits[layer] = direft(read, torch.zeros(rank), torch.linalg.qr(rotation)[0])
    return Adapter(edits, donor.model, "random")


def _rows(one: Profile) -> dict[str, int]:
    return {"end": one.n_end, "text": len(one) - one.n_end}


def _size(one: Adapter) -> int:
    return sum(
        value.nbytes for many in one.interventions.values() for edit in many for value in edit.tensors().values()
    )


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
