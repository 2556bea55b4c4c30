"""The main job on the two packaged models: paste "answer as a numbered list" both ways, with every control."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.adapters.store import ADAPTER, save
from commandv.cli.tables import score_table
from commandv.directories import require_place
from commandv.errors import InputError
from commandv.evaluation import Score, drift, load_task, measure, reply_log_probs
from commandv.interop.load import load_adapter
from commandv.models.generation import generate
from commandv.models.layers import all_layers
from commandv.models.load import LM, load_model
from commandv.profiles.profile import Profile
from commandv.profiles.profiling import profile
from commandv.prompts.sets import PromptSet, load_prompts
from commandv.transfer.convert import Pinv
from commandv.transfer.link import Link
from commandv.transfer.match import nearest
from commandv.transfer.paste import random_like

log = logging.getLogger(__name__)

MODELS = ("gemma-3-270m", "smollm2-135m-instruct")
BEHAVIOUR = "numbered-list"
SEED = 0
DEFAULT = "pasted (commandv default)"
N_SHOWN, SHOWN_TOKENS = 3, 32
_Row = tuple[Score, Score | None]  # rate, drift


def _place(out: Path, donor: str, recipient: str) -> Path:
    return out / f"{BEHAVIOUR}@{recipient}-from-{donor}"


def run(n: int, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run the demo and return its figures, JSON-able.

    Args:
        n: held-out prompts per row.
        out: directory for the pasted adapters.
        quiet: print nothing but progress.

    Raises:
        InputError: `n` is below 16 or above the number of held-out prompts.
    """
    prompts = load_prompts("builtin:questions-test")
    if not 16 <= n <= len(prompts):
        raise InputError(f"n={n}: expected 16 to {len(prompts)} held-out prompts")
    for donor, recipient in (MODELS, MODELS[::-1]):
        require_place(_place(out, donor, recipient), ADAPTER)
    console = Console(quiet=quiet, highlight=False)
    models = {}
    for name in MODELS:
        log.info("loading %s", name)
        models[name] = load_model(name)
    general, text = load_prompts("builtin:general"), load_prompts("builtin:text")
    profiles = {name: profile(lm, general, text=text) for name, lm in models.items()}
    adapters = {name: load_adapter(f"builtin:{BEHAVIOUR}@{name}") for name in MODELS}
    results: dict[str, Any] = {}
    meters = {name: _Meter(lm, prompts[:n], adapters[name]) for name, lm in models.items()}
    for donor, recipient in (MODELS, MODELS[::-1]):
        console.print(f"\n[bold]{donor} -> {recipient}[/bold]: {escape(BEHAVIOUR)}")
        pasted = _variants(adapters[donor], profiles[donor], profiles[recipient])
        place = save(pasted[DEFAULT], _place(out, donor, recipient))
        meter = meters[recipient]
        rows: dict[str, _Row] = {"unmodified": meter.plain}
        for title, adapter in pasted.items():
            log.info("measuring: %s", title)
            rows[title] = meter.adapted(adapter)
        rows["donor with its own adapter"] = meters[donor].own
        rows["trained directly on the recipient"] = meter.own
        table = [(title, behaviour, cost) for title, (behaviour, cost) in rows.items()]
        console.print(score_table(f'Share of answers that are a numbered list, "{recipient}" unless stated', table))
        _show_texts(console, models[recipient], pasted[DEFAULT], prompts.texts[:N_SHOWN])
        console.print(f"\nThe pasted adapter is in {place}")
        results[f"{donor} -> {recipient}"] = {
            "adapter": str(place),
            "rows": {
                title: {"rate": behaviour._asdict(), "drift": cost._asdict() if cost else None}
                for title, (behaviour, cost) in rows.items()
            },
        }
    return results


def _variants(adapter: Adapter, donor: Profile, recipient: Profile) -> dict[str, Adapter]:
    """Return the pasted adapter and its controls, by title."""
    link = Link(donor, recipient)
    default, as_published = link.paste(adapter), replace(link, fit=Pinv(), write_rows="end", holdout=0)
    return {
        DEFAULT: default,
        "pasted as published (pinv)": as_published.paste(adapter, match=nearest, layers=all_layers),
        "random, equal norm": random_like(default, SEED),
        "shuffled pairs": replace(link, shuffle=SEED).paste(adapter),
    }


def _show_texts(console: Console, lm: LM, adapter: Adapter, prompts: list[str]) -> None:
    """Print answers without and with the adapter."""
    before = generate(lm, prompts, max_new_tokens=SHOWN_TOKENS)
    with attach(lm, adapter):
        after = generate(lm, prompts, max_new_tokens=SHOWN_TOKENS)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        console.print(f"\n[bold]{escape(prompt)}[/bold]\n[dim]before:[/dim] {escape(old.strip())}")
        console.print(f"[dim]after: [/dim] {escape(new.strip())}")


class _Meter:
    """Measures adapters on one model against the same prompts and the same unmodified reference."""

    def __init__(self, lm: LM, prompts: PromptSet, trained: Adapter) -> None:
        self.lm, self.trained = lm, trained
        self.task = replace(load_task(BEHAVIOUR), test=prompts)
        self.passages = load_prompts("builtin:drift")

    @functools.cached_property
    def plain(self) -> _Row:
        """The model as it is."""
        return measure(self.lm, self.task).score(), None

    @functools.cached_property
    def own(self) -> _Row:
        """The model with the adapter that was trained on it."""
        return self.adapted(self.trained)

    @functools.cached_property
    def _reference(self) -> list[Tensor]:
        return reply_log_probs(self.lm, self.passages)

    def adapted(self, adapter: Adapter) -> _Row:
        """Return (rate, drift) with an adapter attached."""
        rate = measure(self.lm, self.task, adapter).score()
        return rate, drift(self.lm, self.passages, adapter, reference=self._reference)
