"""Findings as words and tables of text, from which HTML and Markdown are both written, so that they agree."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from commandv.evaluation.report import curves
from commandv.evaluation.report.findings import (
    CROSSES,
    DOES_NOT,
    NOT_EXAMINABLE,
    PARTLY,
    RANDOM,
    UNMODIFIED,
    VERDICTS,
    Group,
    Row,
    Table,
)
from commandv.evaluation.results import Run
from commandv.evaluation.scores import Score

MOST_CLAUSES = 4  # an answer with more verdicts than this counts them and names only those that cross
MOST_NAMES = 6  # of those
NONE = "–"
_PATH = re.compile(r"(?<![\w./~>])(?:[A-Za-z]:[\\/]|/(?!/)|~/)(?:[^\s\\/'\":,;|()<>]+[\\/])+([^\s\\/'\":,;|()<>]*)")
_FILE_URL = re.compile(r"file://\S*/(\S+)")

MEANINGS = {
    UNMODIFIED: "the recipient as it is",
    "pasted": "the donor's adapter or vector, carried with commandv's default method",
    "pinv": "carried as published: pseudo-inverse, nearest layers",
    RANDOM: "random directions of the paste's size; for a vector at the strength that suits them best",
    "shuffled": "carried through converters fitted on wrongly paired prompts",
    "mean-ablation": "the state replaced by its mean where the paste acts; for a vector only its part along it",
    "text-bridge": "a steering vector from the donor's answers alone",
    "direct": "the recipient's own: the same adapter trained on it, or the vector found in it",
    "donor": "the donor with its own adapter or vector",
}


class Grid(NamedTuple):
    """A table of text; the first column heads its rows."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def portable(text: str) -> str:
    """Return a text with absolute paths cut down to their last part: where a file lay on one machine helps nobody."""
    text = _FILE_URL.sub(lambda found: f"…/{found[1]}", text)
    return _PATH.sub(lambda found: f"…/{found[1]}", text)


def number(value: float, digits: int = 2) -> str:
    """Format a figure; infinity and unknown as such."""
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:.{digits if abs(value) < 1000 else 0}f}"
    return text.removeprefix("-") if not float(text) else text


def interval(score: Score, digits: int = 2) -> str:
    """Format a 95 % interval."""
    return f"[{number(score.low, digits)}, {number(score.high, digits)}]"


def figure(score: Score | None, digits: int = 2) -> str:
    """Format a figure with its interval."""
    return NONE if score is None else f"{number(score.value, digits)} {interval(score, digits)}"


def p_value(p: float | None) -> str:
    """Format a p-value."""
    if p is None:
        return NONE
    return "< .001" if p < 0.001 else f"{p:.3f}"


def amount(score: Score) -> str:
    """Format a figure with its unit."""
    return f"{number(score.value)} {'of answers' if score.unit == 'rate' else score.unit}"


def pooled_cell(row: Row | None) -> str:
    """Return a method's figure with its interval."""
    return NONE if row is None or row.found is None else figure(row.found.score)


def method_grid(group: Group, table: Table) -> Grid:
    """Return every method of one table."""
    measures = sorted({name for row in table.rows for name in row.price})
    what = "rate" if table.unit == "rate" else f"mean, {table.unit}"
    header = ["method", "n", "seeds", what, "95 % interval", "difference from unmodified", "adjusted p", "recovered"]
    header += [_measure_title(name) for name in measures] + ["scale", "layers"]
    rows = []
    for row in table.rows:
        found, price = row.found, [_price_cell(row, name) for name in measures]
        cells = [row.method, f"{found.score.n}" if found else "0", _seeds(row)]
        cells += [number(found.score.value), interval(found.score)] if found else [NONE, NONE]
        cells += [figure(found.difference), p_value(found.adjusted)] if found else [NONE, NONE]
        cells.append(figure(found.recovered) if found and found.recovered else row.why_none)
        scale = NONE if row.method == UNMODIFIED else ", ".join(f"{one:g}" for one in row.scales)
        rows.append([*cells, *price, scale, layer_ranges(row.layers)])
    aim = "" if table.success == "more" else "; less is the aim"
    return Grid(f"{group.behaviour}, {group.pair}: {table.task}, test prompts{aim}", header, rows)


def _measure_title(name: str) -> str:
    known = {"kl": "KL to unmodified, nats/token", "perplexity": "perplexity", "loops": "loops"}
    return known.get(name, f"{name}, nats/token")


def _price_cell(row: Row, measure: str) -> str:
    if measure in row.price:
        return figure(row.price[measure], 1 if measure == "perplexity" else 3)
    return "0 (reference)" if row.method == UNMODIFIED and measure == "kl" else NONE


def _seeds(row: Row) -> str:
    values = ", ".join(number(value) for value in row.by_seed.values())
    return f"{len(row.by_seed)} ({values})" if len(row.by_seed) > 1 else f"{len(row.by_seed)}"


def layer_ranges(layers: Sequence[int]) -> str:
    """Write layers as ranges: 20, 22 to 25."""
    if not layers:
        return NONE
    parts, start = [], layers[0]
    for one, following in zip(layers, [*layers[1:], None], strict=True):
        if following != one + 1:
            parts.append(f"{start}" if start == one else f"{start} to {one}" if one > start + 1 else f"{start}, {one}")
            start = following if following is not None else one
    return ", ".join(parts)


def table_notes(table: Table) -> list[str]:
    """Say what a reader of one table must know beside its figures."""
    notes = list(table.notes)
    unjudged = [f"{row.method} {row.unjudged}" for row in table.rows if row.unjudged]
    if unjudged:
        notes.append(f"Answers without judgment, not counted in n: {', '.join(unjudged)}.")
    seeds = {seed for row in table.rows for seed in row.by_seed}
    if len(seeds) == 1:
        notes.append("One seed: nothing is said of how the figures vary between seeds.")
    short = [row.method for row in table.rows if len(row.by_seed) < len(seeds)]
    if short:
        notes.append(f"Measured with some seeds only: {', '.join(short)}.")
    if table.beside:
        others = "; ".join(f"{arm.method} at scale {arm.scale:g}: {figure(score)}" for arm, score in table.beside)
        notes.append(f"Measured as well, at other scales than those chosen: {others}.")
    return notes


def curve_grid(group: Group, table: Table, points: Sequence[curves.Tried]) -> Grid:
    """Return the settings that were tried on the development split."""
    what = "rate" if table.unit == "rate" else f"mean, {table.unit}"
    header = ["method", "layers", "scale", what, "KL, nats/token", "seeds", "chosen by", "on the front"]
    rows = [
        [one.method, one.layers, f"{one.scale:g}", number(one.value), number(one.kl, 3), f"{one.seeds}",
         f"{one.chosen} of {one.seeds}", "yes" if one.front else "no"]
        for one in points
    ]  # fmt: skip
    return Grid(f"{group.behaviour}, {group.pair}: settings tried on development prompts", header, rows)


def curve_words(points: Sequence[curves.Tried]) -> list[str]:
    """Say for each method and layer choice how effect and price go along the scales."""
    return [f"{method}, {layers}: {curves.shape(own)}." for (method, layers), own in curves.lines(points).items()]


def fit_grid(pair: str, found: Sequence[curves.Fit]) -> Grid:
    """Return the converters' held-out quality; adapters and vectors have different figures."""
    known = [name for name in curves.QUALITIES if any(math.isfinite(one.values[name]) for one in found)]
    header = ["behaviour", "method", "layers", "n", *(curves.QUALITIES[name] for name in known)]
    rows = [
        [one.behaviour, one.method, f"{one.donor} → {one.recipient}", f"{one.n}"]
        + [number(one.values[name]) for name in known]
        for one in found
    ]
    return Grid(
        f"{pair}: converters on prompts that they were not fitted on, by layer pair (donor → recipient)", header, rows
    )


def fit_words(found: Sequence[curves.Fit], quality: str) -> str:
    """Say for each method between what R² its layers lie."""
    words = []
    for method, layers in curves.by_layer(found, quality).items():
        known = {layer: value for layer, value in layers.items() if math.isfinite(value)}
        if known:
            low, high = min(known, key=lambda one: known[one]), max(known, key=lambda one: known[one])
            words.append(f"{method} {number(known[low])} (layer {low}) to {number(known[high])} (layer {high})")
    return "; ".join(words) or "no figures"


def verdict_grid(groups: Sequence[Group]) -> Grid:
    """Return the verdicts with the figures that they rest on."""
    header = ["behaviour", "verdict", "pair", "pasted", "unmodified", "random", "recovered"]
    rows = []
    for group in groups:
        table = group.tables[0] if group.tables else None
        own = [pooled_cell(table.row(name)) if table else NONE for name in ("pasted", UNMODIFIED, RANDOM)]
        row = table.row("pasted") if table else None
        recovered = figure(row.found.recovered) if row and row.found else NONE
        rows.append([group.behaviour, group.verdict.word, group.pair, *own, recovered])
    return Grid("Verdict for each behaviour and pair; rates or means with 95 % intervals", header, rows)


def answer(run: Run, groups: Sequence[Group]) -> str:
    """Return the answer in one sentence, made of the figures."""
    if not groups or not any(group.tables for group in groups):
        return "There is no answer yet: no cell of this study has results."
    if len(groups) <= MOST_CLAUSES:
        sentence = "; ".join(map(_clause, groups))
    else:
        counts = Counter(group.verdict.word for group in groups)
        told = ", ".join(f"{counts[word]} {_verb(word, counts[word])}" for word in VERDICTS if counts[word])
        crossing = [group for group in groups if group.verdict.word in (CROSSES, PARTLY)]
        named = ": " + "; ".join(map(_short, crossing)) if 0 < len(crossing) <= MOST_NAMES else ""
        sentence = f"of {len(groups)} behaviours and pairs {told}{named}"
    if len(_done(run)) < run.planned:
        sentence = f"so far, {sentence}"
    return sentence[0].upper() + sentence[1:] + "."


def _verb(word: str, count: int) -> str:
    if word in (CROSSES, PARTLY, DOES_NOT):
        singular = {CROSSES: CROSSES, PARTLY: "crosses partly", DOES_NOT: DOES_NOT}[word]
        return singular if count == 1 else singular.replace("crosses", "cross").replace("does", "do")
    return f"{'is' if count == 1 else 'are'} {word}"


def _clause(group: Group) -> str:
    word = group.verdict.word
    lead = {
        CROSSES: f"{group.behaviour} crosses {group.pair}",
        PARTLY: f"{group.behaviour} crosses {group.pair} partly",
        DOES_NOT: f"{group.behaviour} does not cross {group.pair}",
    }.get(word, f"{group.behaviour} {group.pair} is {word}")
    return f"{lead} ({figures(group)})"


def _short(group: Group) -> str:
    row = group.tables[0].row("pasted")
    assert row  # whatever crosses has a figure
    assert row.found
    how = "partly, " if group.verdict.word == PARTLY else ""
    return f"{group.behaviour} {group.pair} ({how}{figure(row.found.score)})"


def figures(group: Group) -> str:
    """Return the figures that a verdict rests on."""
    table = group.tables[0] if group.tables else None
    row = table.row("pasted") if table else None
    if table is None or row is None or row.found is None:
        return group.verdict.why
    told = [f"{amount(row.found.score)} {interval(row.found.score)}"]
    for name in (UNMODIFIED, RANDOM, *(("direct",) if group.verdict.word == NOT_EXAMINABLE else ())):
        other = table.row(name)
        if other and other.found:
            told.append(f"{name} {number(other.found.score.value)}")
    return ", ".join(told)


def failures(groups: Sequence[Group]) -> list[str]:
    """List what did not transfer, or not wholly, with figures."""
    told = []
    for group in groups:
        if group.verdict.word != CROSSES:
            reasons = dict.fromkeys([figures(group), group.verdict.why])
            told.append(f"{group.behaviour}, {group.pair}: {group.verdict.word}; {'; '.join(reasons)}.")
    return told


def failed_grid(run: Run) -> Grid:
    """Return the cells that failed with their errors."""
    rows = [
        [cell.behaviour, f"{cell.donor} → {cell.recipient}", f"{cell.seed}", portable(cell.error) or "no message"]
        for cell in run.cells
        if cell.state == "failed"
    ]
    return Grid("Cells that failed", ["behaviour", "pair", "seed", "error"], rows)


def warnings(run: Run, groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return what must be said before any figure, as (heading, text)."""
    done, failed = len(_done(run)), sum(cell.state == "failed" for cell in run.cells)
    found = []
    if done < run.planned:
        missing = max(run.planned - len(run.cells), 0)
        counts = [f"{done} of {run.planned} cells are finished", f"{failed} failed", f"{missing} have not run"]
        found.append(("Partial run", ", ".join(counts) + ". Figures cover the finished cells only."))
    if run.ignored:
        told = "; ".join(f"{name} ({reason})" for name, reason in list(run.ignored.items())[:5])
        more = f" and {len(run.ignored) - 5} more" if len(run.ignored) > 5 else ""
        found.append(("Files not counted", f"Among the cells lie files that are none of this study's: {told}{more}."))
    if run.left_out:
        names = ", ".join(f"{name} ({MEANINGS.get(name, 'a control')})" for name in run.left_out)
        found.append(("Controls left out", f"By explicit wish this study did not measure: {names}. "
                      "What they would have ruled out is not ruled out."))  # fmt: skip
    if any(cell.settings.get("rehearsed") is not None for cell in run.cells):
        text = "The models have random weights: this run proves plumbing, its figures mean nothing."
        found.append(("Rehearsal", text))
    if any("does not say whether" in note for group in groups for table in group.tables for note in table.notes):
        found.append(("Aim not recorded", "Some tasks do not say whether more or less is the aim; more was taken."))
    return found


def _done(run: Run) -> list[object]:
    return [cell for cell in run.cells if cell.state == "done"]
