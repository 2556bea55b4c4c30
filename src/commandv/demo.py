"""The main job on the two packaged models: paste "answer as a numbered list" both ways, with every control."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from commandv.adapter import Adapter
from commandv.convert import FactorStore, Pinv
from commandv.errors import InputError
from commandv.evaluate import GRADERS, Score, behaviour_rate, drift, reply_log_probs
from commandv.load import load_adapter
from commandv.match import all_layers, nearest
from commandv.models import LM, load_model
from commandv.pasting import paste, random_like
from commandv.profiles import Profile, profile
from commandv.prompts import PromptSet, load_prompts
from commandv.store import save
from commandv.tables import score_table

log = logging.getLogger(__name__)

MODELS = ("gemma-3-270m", "smollm2-135m-instruct")
BEHAVIOUR = "numbered-list"
SEED = 0
N_SHOWN = 3
_Row = tuple[Score, Score | None, list[str]]  # rate, drift, answers


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
    console = Console(quiet=quiet, highlight=False)
    models = {}
    for name in MODELS:
        log.info("loading %s", name)
        models[name] = load_model(name)
    general, text = load_prompts("builtin:general"), load_prompts("builtin:text")
    profiles = {name: profile(lm, general, text=text) for name, lm in models.items()}
    adapters = {name: load_adapter(f"builtin:{BEHAVIOUR}@{name}") for name in MODELS}
    results: dict[str, Any] = {}
    meters = {name: _Meter(lm, prompts[:n]) for name, lm in models.items()}
    for donor, recipient in (MODELS, MODELS[::-1]):
        console.print(f"\n[bold]{donor} -> {recipient}[/bold]: {escape(BEHAVIOUR)}")
        pasted = _variants(adapters[donor], profiles[donor], profiles[recipient])
        place = save(pasted["pasted (commandv default)"], out / f"{BEHAVIOUR}@{recipient}-from-{donor}")
        meter = meters[recipient]
        rows: dict[str, _Row] = {"unmodified": meter.plain()}
        for title, adapter in pasted.items():
            log.info("measuring: %s", title)
            rows[title] = meter.adapted(adapter)
        rows["donor with its own adapter"] = meters[donor].adapted(adapters[donor])
        rows["trained directly on the recipient"] = meter.adapted(adapters[recipient])
        table = [(title, behaviour, cost) for title, (behaviour, cost, _) in rows.items()]
        console.print(score_table(f'Share of answers that are a numbered list, "{recipient}" unless stated', table))
        before, after = rows["unmodified"][2], rows["pasted (commandv default)"][2]
        for prompt, old, new in list(zip(prompts.texts, before, after, strict=False))[:N_SHOWN]:
            console.print(f"\n[bold]{escape(prompt)}[/bold]\n[dim]before:[/dim] {escape(old.strip())}")
            console.print(f"[dim]after: [/dim] {escape(new.strip())}")
        console.print(f"\nThe pasted adapter is in {place}")
        results[f"{donor} -> {recipient}"] = {
            "adapter": str(place),
            "rows": {
                title: {"rate": behaviour._asdict(), "drift": cost._asdict() if cost else None}
                for title, (behaviour, cost, _) in rows.items()
            },
        }
    return results


def _variants(adapter: Adapter, donor: Profile, recipient: Profile) -> dict[str, Adapter]:
    """Return the pasted adapter and its controls, by title."""
    store = FactorStore()
    default = paste(adapter, donor, recipient, store=store)
    return {
        "pasted (commandv default)": default,
        "pasted as published (pinv)": paste(
            adapter, donor, recipient, fit=Pinv(), match=nearest, layers=all_layers, write_rows="end", holdout=0
        ),
        "random, equal norm": random_like(default, SEED),
        "shuffled pairs": paste(adapter, donor, recipient, shuffle=SEED),
    }


class _Meter:
    """Measures adapters on one model against the same prompts and the same unmodified reference."""

    def __init__(self, lm: LM, prompts: PromptSet) -> None:
        self.lm, self.prompts, self.grader = lm, prompts, GRADERS[BEHAVIOUR]
        self.passages = load_prompts("builtin:drift")
        self._reference: Any = None

    def plain(self) -> _Row:
        """Return (rate, no drift, answers) of the model as it is."""
        score, answers = behaviour_rate(self.lm, self.prompts, self.grader)
        return score, None, answers

    def adapted(self, adapter: Adapter) -> _Row:
        """Return (rate, drift, answers) with an adapter attached."""
        if self._reference is None:
            self._reference = reply_log_probs(self.lm, self.passages)
        score, answers = behaviour_rate(self.lm, self.prompts, self.grader, adapter)
        return score, drift(self.lm, self.passages, adapter, reference=self._reference), answers
