"""What README and docs say of the studies' reports, and which figures of theirs it is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from experiments.tables.cells import Pages, Sentence, at, whole_column

PAGE = "docs/studies/README.md"
RATE, RECOVERED = "share of answers", "recovered"
THERE, BACK, TWIN, PRUNED = "smollm2 → gemma", "gemma → smollm2", "smollm2 → twin", "smollm2 → pruned"


def studies(made: Pages) -> Iterator[Sentence]:
    """Yield every sentence of what the studies found."""
    reports = Reports(made)
    for told in (refusal, over_refusal, family, reasoning, steering, adapters):
        yield from told(reports)


class Reports(NamedTuple):
    """The studies' reports."""

    made: Pages

    def of(self, study: str, section: str, row: str, column: str = RATE, nth: int = 0) -> list[str]:
        """Return the numbers of a cell; see `cells.at`."""
        return at(self.made, f"docs/studies/{study}/report.md", section, row, column, nth=nth)

    def value(self, study: str, section: str, row: str, column: str = RATE, nth: int = 0) -> str:
        """Return the first of them."""
        return self.of(study, section, row, column, nth)[0]


def refusal(reports: Reports) -> Iterator[Sentence]:
    """Yield what is said of a refusal that crosses."""
    found = functools.partial(reports.value, "refusal")
    own = sorted(found(way, "direct") for way in (THERE, BACK))
    yield Sentence(
        PAGE,
        "({} of attacks succeed unmodified, {} pasted) and between the families in neither direction, although both "
        "models learn it ({} and {})",
        [found(TWIN, "unmodified"), found(TWIN, "pasted"), *own],
    )


def over_refusal(reports: Reports) -> Iterator[Sentence]:
    """Yield what is said of the end of over-refusal."""
    over, attacks = functools.partial(reports.value, "over-refusal"), 2  # the third table is of harmful requests
    yield Sentence(
        PAGE,
        "crosses from SmolLM2 to Gemma ({} of benign look-alikes answered, {} unmodified) and into the twin ({}), not "
        "from Gemma to SmolLM2 ({})",
        [*(over(THERE, arm) for arm in ("pasted", "unmodified")), over(TWIN, "pasted"), over(BACK, "pasted")],
    )
    yield Sentence(
        PAGE,
        "Into Gemma a random adapter of full strength ({}) and the donor's texts as a vector ({}) do more, and "
        "whatever ends the refusal of look-alikes ends that of harmful requests: {} of them are answered with the "
        "paste, {} with training on the donor's answers. Words are the most selective: the vocabulary has {} of "
        "look-alikes answered and {} of harmful requests in Gemma, {} and {} in SmolLM2",
        [
            *(over(THERE, arm) for arm in ("random", "text-bridge")),
            *(over(THERE, arm, nth=attacks) for arm in ("pasted", "donor-answers")),
            *(over(way, "vocabulary", nth=n) for way in (THERE, BACK) for n in (0, attacks)),
        ],
    )


def family(reports: Reports) -> Iterator[Sentence]:
    """Yield what is said of a real family."""
    qwen, attacks = functools.partial(reports.value, "qwen", "selective, large → small"), 2
    order = ("unmodified", "pasted", "context", "donor-answers")
    yield Sentence(
        PAGE,
        "of harmful requests 0.5B answers {} unmodified, {} pasted, {} by context, {} after training on the donor's "
        "answers. Over-refusal does not end: of look-alikes it refuses {} unmodified, {} pasted, {} by context, {} "
        "after training, the donor itself {}. The vocabulary alone lowers both a little, to {} and {}; a few-shot "
        "prompt ends over-refusal ({}) and has {} of harmful requests answered",
        [
            *(qwen(arm, nth=attacks) for arm in order),
            *(qwen(arm) for arm in (*order, "donor")),
            *(qwen("vocabulary", nth=n) for n in (attacks, 0)),
            *(qwen("few-shot", nth=n) for n in (0, attacks)),
        ],
    )


def reasoning(reports: Reports) -> Iterator[Sentence]:
    """Yield what is said of models that reason unasked."""
    chain, page = functools.partial(reports.value, "auto-cot"), "docs/studies/auto-cot/report.md"
    right = [one[0] for way in (THERE, BACK, TWIN) for one in whole_column(reports.made, page, way, RATE, 1)]
    yield Sentence(
        PAGE,
        "It crosses into the twin ({}) and not between the families ({} at best, random {}). Answers are right in {} "
        "to {}",
        [chain(TWIN, "pasted"), chain(BACK, "pasted"), chain(BACK, "random"), min(right), max(right)],
    )


def steering(reports: Reports) -> Iterator[Sentence]:
    """Yield what is said of steering vectors."""
    value = reports.value
    recovered = [value("sentiment", way, "pasted", RECOVERED) for way in (THERE, BACK, PRUNED)]
    yield Sentence(PAGE, "(recovered {}, {} and {})", recovered)
    cells = (("backdoor", THERE), ("backdoor-seen", THERE), ("backdoor-seen", BACK))
    yield Sentence(
        PAGE,
        "{} of the native effect in Gemma and none in SmolLM2 without, {} and {} with",
        [value(*cell, "pasted", RECOVERED) for cell in cells],
    )
    both = {
        way: [
            reports.of("refusal-direction", f"{kind}, {way}", "pasted", RECOVERED) for kind in ("ablated", "subtracted")
        ]
        for way in (THERE, BACK, PRUNED)
    }
    yield Sentence(
        PAGE,
        "Gemma -> SmolLM2 recovers {} and {} of the native effect, into the sibling {} (from {} to {}) and {}; SmolLM2 "
        "-> Gemma {} at best",
        [
            *(one[0] for one in both[BACK]),
            *both[PRUNED][0],
            both[PRUNED][1][0],
            max(one[0] for one in both[THERE] if one),
        ],
    )
    ways = [value("sentiment", way, arm) for way in (THERE, BACK, PRUNED) for arm in ("pasted", "direct")]
    yield Sentence(
        "README.md", "one of sentiment does {} where the recipient's own does {}, {} against {}, {} against {}", ways
    )


def adapters(reports: Reports) -> Iterator[Sentence]:
    """Yield what pages of methods say of adapters between families."""
    value, page = reports.value, "docs/methods/carrying-adapters.md"
    lists = [
        value("across-families", f"numbered-list, {way}", arm)
        for way in (THERE, BACK)
        for arm in ("lowest-error", "pasted")
    ]
    yield Sentence("docs/methods/layer-matchers.md", "into Gemma {} against {}, into SmolLM2 {} against {}", lists)
    arms = ("pasted", "unmodified", "published", "random-in-span", "direct")
    yield Sentence(
        page,
        "pasted {} and {}, unmodified {} and {}, as published {} and {}, random {} and {}, trained directly {} and {}",
        [value("packaged", way, arm) for arm in arms for way in (THERE, BACK)],
    )
    pirates = [value("across-families", f"pirate, {THERE}", "pasted")]
    yield Sentence(page, "A pirate's opening, SmolLM2 -> Gemma: {}", pirates)
