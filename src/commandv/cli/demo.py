"""The main job on the two packaged models: paste "answer as a numbered list" both ways, beside the other arms."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.adapters.store import ADAPTER, save
from commandv.cli.tables import arms_table
from commandv.errors import InputError
from commandv.evaluation import Comparison, compare, load_task
from commandv.evaluation.arms import ARMS, PASTED, Made, arms_without, make_arm
from commandv.evaluation.material import Material
from commandv.evaluation.meter import Measured, Meter, price_scores
from commandv.interop.load import load_adapter
from commandv.models.generation import generate
from commandv.models.load import LM, load_model
from commandv.profiles.profiling import profile
from commandv.prompts.sets import load_prompts
from commandv.storage.directories import require_place
from commandv.transfer.link import link

log = logging.getLogger(__name__)

MODELS = ("gemma-3-270m", "smollm2-135m-instruct")
BEHAVIOUR = "numbered-list"
LEFT_OUT = ("mean-ablation", "text-bridge", "context", "vocabulary", "donor-answers")  # minutes each; a study has them
N_ASKED = 32  # development prompts that the donor answers for the few-shot prompt
DONOR = "donor"
N_SHOWN, SHOWN_TOKENS = 3, 32


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
    task = replace(load_task(BEHAVIOUR), test=prompts[:n])
    models = {}
    for name in MODELS:
        log.info("loading %s", name)
        models[name] = load_model(name)
    general, text = load_prompts("builtin:general"), load_prompts("builtin:text")
    profiles = {name: profile(lm, general, text=text) for name, lm in models.items()}
    adapters = {name: load_adapter(f"builtin:{BEHAVIOUR}@{name}") for name in MODELS}
    meters = {name: Meter(lm, [task]) for name, lm in models.items()}
    results: dict[str, Any] = {}
    for donor, recipient in (MODELS, MODELS[::-1]):
        console.print(f"\n[bold]{donor} -> {recipient}[/bold]: {escape(BEHAVIOUR)}")
        material = Material(
            adapter=adapters[donor],
            link=link(profiles[donor], profiles[recipient]),
            recipient_lm=models[recipient],
            donor_lm=models[donor],
            prompts=general,
            asked=task.dev[:N_ASKED],
            direct=adapters[recipient],
        )
        made = {name: make_arm(name, material) for name in arms_without(LEFT_OUT)}
        pasted = made[PASTED].adapter
        assert pasted is not None
        place = save(pasted, _place(out, donor, recipient))
        found: dict[str, Measured] = {}
        for name, one in made.items():
            log.info("measuring: %s", name)
            found[name] = meters[recipient].measured(one)
        own = meters[donor].measured(Made(adapters[donor]))
        rows = compare({name: [one.outcomes[task.name].labels] for name, one in found.items()}, "rate", task.success)
        rows.append(Comparison(DONOR, own.outcomes[task.name].score()))
        found[DONOR] = own
        results[f"{donor} -> {recipient}"] = {"adapter": str(place), "rows": _plain(rows, found, made)}
        console.print(_table(f'Share of answers that are a numbered list, "{recipient}"', rows, found, made))
        meanings = [f"{name}: {ARMS[name].about}" for name in made]
        console.print("\n".join([*meanings, f"{DONOR}: {donor} with its own adapter"]), style="dim")
        _show_texts(console, models[recipient], pasted, prompts.texts[:N_SHOWN])
        console.print(f"\nThe pasted adapter is in {place}")
    return results


def _table(title: str, rows: list[Comparison], found: dict[str, Measured], made: dict[str, Made]) -> Any:
    task = next(iter(found[PASTED].outcomes))
    return arms_table(
        title,
        rows,
        price={name: price_scores(one.price) for name, one in found.items()},
        loops={name: one.outcomes[task].loop_rate() for name, one in found.items()},
        words={name: one.outcomes[task].mean_words() for name, one in found.items()},
        tokens={name: one.cost.tokens for name, one in made.items()},
    )


def _plain(rows: list[Comparison], found: dict[str, Measured], made: dict[str, Made]) -> dict[str, Any]:
    """Return the table as plain values."""
    return {
        row.method: {
            "rate": row.score._asdict(),
            "difference": row.difference._asdict() if row.difference else None,
            "loops": next(iter(found[row.method].outcomes.values())).loop_rate()._asdict(),
            "price": {name: score._asdict() for name, score in price_scores(found[row.method].price).items()},
            "cost": made[row.method].cost._asdict() if row.method in made else None,
        }
        for row in rows
    }


def _show_texts(console: Console, lm: LM, adapter: Adapter, prompts: list[str]) -> None:
    """Print answers without and with the adapter."""
    before = generate(lm, prompts, max_new_tokens=SHOWN_TOKENS)
    with attach(lm, adapter):
        after = generate(lm, prompts, max_new_tokens=SHOWN_TOKENS)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        console.print(f"\n[bold]{escape(prompt)}[/bold]\n[dim]before:[/dim] {escape(old.strip())}")
        console.print(f"[dim]after: [/dim] {escape(new.strip())}")
