"""Every sentence and every row with a figure in pages that are written by hand, and where the figure comes from.

A sentence is a piece of the page with `{}` for each figure; line breaks do not count. Figures come out of the tables of
the pages that are made whole (`pages.PAGES`), or of a study's labels. A page with a figure that is in none of these
lists does not pass: see `experiments.tables.figures`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from commandv.evaluation import difference
from commandv.evaluation.report.findings import Group, groups
from commandv.evaluation.results import load_run
from experiments.tables.cells import Pages, Sentence, at, numbers, shown
from experiments.tables.pages import RUNS
from experiments.tables.studies import studies
from experiments.tables.vectors import CONCEPTS

MAPPERS, SEVERAL, VECTORS, SAE = (f"docs/benchmarks/{name}.md" for name in ("mappers", "several", "vectors", "sae"))
WAYS = ("gemma-3-270m -> smollm2-135m-instruct", "smollm2-135m-instruct -> gemma-3-270m")


def sentences(made: Pages) -> Iterator[Sentence]:
    """Yield every sentence with its figures, from the pages that are made whole."""
    yield from packaged()
    yield from studies(made)
    yield from methods(made)
    yield from vectors(made)
    yield from words(made)
    yield from forecast(made)


# -- the README's first table -----------------------------------------------------------------------------------------

INTO = ("smollm2 → gemma", "gemma → smollm2")
WAYS_SHORT = ("SmolLM2 -> Gemma", "Gemma -> SmolLM2")
ROWS = {
    "unmodified": "unmodified",
    "**pasted**, in under a second": "pasted",
    "**by context**": "context",
    "**by vocabulary**": "vocabulary",
    "as published": "published",
    "random, within the recipient's activations": "random-in-span",
    "wrongly paired prompts": "shuffled",
    "the donor's texts as a vector": "text-bridge",
    "few-shot prompt, {} to {} tokens a request": "few-shot",
    "trained on the donor's answers": "donor-answers",
    "the recipient's own adapter": "direct",
    "the donor with its adapter": "donor",
}


@functools.cache
def packaged_groups() -> dict[tuple[str, str], Group]:
    """Return what the study of the packaged models found, by behaviour and pair."""
    return {(one.behaviour, one.pair): one for one in groups(load_run(RUNS / "packaged"))}


def packaged(page: str = "README.md") -> Iterator[Sentence]:
    """Yield the README's first tables, effect and price both ways."""
    for behaviour, title in (("numbered-list", "numbered list"), ("pirate", "pirate's opening")):
        both = [packaged_groups()[behaviour, way] for way in INTO]
        arms = [arm for one in both for cell in one.cells for arm in cell.arms]
        tokens = sorted(arm.cost.tokens for arm in arms if arm.method == "few-shot")
        lines, figures = [f"| {title} | {' | '.join(f'{way} | loops | KL' for way in WAYS_SHORT)} |"], list[str]()
        lines.append("|---" * 7 + "|")
        for told, name in ROWS.items():
            kl = {"unmodified": "0", "donor": ""}.get(name, "{}")
            lines.append(f"| {told} {2 * f'| {{}} [{{}}, {{}}] | {{}} | {kl} '}|".replace("|  |", "| |"))
            figures += [f"{tokens[0]:.0f}", f"{tokens[-1]:.0f}"] if name == "few-shot" else []
            for one in both:
                row = next(row for row in one.tables[0].rows if row.arm == name)
                assert row.found is not None
                figures += [*(shown(figure) for figure in row.found.score[1:4]), shown(row.price["loops"].value)]
                figures += [shown(row.price["kl_first"].value, 1)] if kl == "{}" else []
        yield Sentence(page, "\n".join(lines), figures)
        said = "{} [{}, {}] into Gemma and {} [{}, {}] into SmolLM2"
        for rival, text in COMPARED[behaviour].items():
            gaps = [difference("", *(_labels(one, name) for name in ("context", rival)), "rate") for one in both]
            yield Sentence(page, text.replace("{}", said), [shown(figure) for gap in gaps for figure in gap[1:4]])


COMPARED = {  # of each behaviour: rival -> how the README says what the context does more
    "numbered-list": {"donor-answers": "of lists no more that can be told, {}", "few-shot": "(lists by {},"},
    "pirate": {"donor-answers": "best of three learning rates, {},", "few-shot": "openings by {})"},
}


def _labels(group: Group, arm: str) -> list[list[float | None]]:
    """Return an arm's labels of a group's own task, seed by seed."""
    return [one.labels[group.tables[0].task] for cell in group.cells for one in cell.arms if one.method == arm]


# -- methods ----------------------------------------------------------------------------------------------------------


def methods(made: Pages) -> Iterator[Sentence]:
    """Yield what pages of methods say of the comparison of mappers, of judges, features and mapped states."""

    def two(row: str, way: str) -> list[str]:
        return [at(made, MAPPERS, f"{way}", row, column)[0] for column in ("read R²", "write R²")]

    def lists(row: str) -> list[str]:
        return [at(made, MAPPERS, way, row, "behaviour")[0] for way in WAYS]

    for name, row in (("ridge", "ridge"), ("reduced-rank", "reduced rank"), ("pinv", "pinv (published)"),
                      ("affine", "affine"), ("procrustes", "Procrustes"),
                      ("fourier-ridge", "Fourier ridge")):  # fmt: skip
        page, found = f"docs/methods/{name}.md", [*two(row, WAYS[0]), *two(row, WAYS[1])]
        yield Sentence(page, "Gemma -> SmolLM2 {} and {}, SmolLM2 -> Gemma {} and {}", found)
        yield Sentence(page, "the list {} and {}", lists(row))
    carrying = "docs/methods/carrying-adapters.md"
    text = (
        "the list into SmolLM2 and into Gemma, on development prompts, {} and {} by ridge, {} and {} by Fourier "
        "features, {} and {} by an autoencoder; written by last-token rows {} and {}"
    )
    rows = ("ridge", "Fourier ridge", "autoencoder, longer", "ridge, written by last-token rows")
    yield Sentence(carrying, text, [one for row in rows for one in lists(row)])
    one, both = "smollm2-135m-instruct: adapters of its own", ("list", "pirate's opening")
    alone = [at(made, SEVERAL, one, row, column)[0] for row, column in zip(("list", "pirate"), both, strict=True)]
    together = [at(made, SEVERAL, one, "list + pirate", column)[0] for column in both]
    yield Sentence(carrying, "of SmolLM2, {} and {} alone, are {} and {} together", [*alone, *together])
    held = [at(made, MAPPERS, way, row, "held", digits=1)[0] for row in ("Fourier ridge", "ridge") for way in WAYS]
    held[2:] = [f"0{one}" for one in held[2:]]
    yield Sentence("docs/methods/fourier-ridge.md", "{} and {} MB held where ridge holds {} and {}", held)
    for name, row in (("affine-twin", "its affine twin"), ("autoencoder", "autoencoder")):
        figures = []
        for number, way in enumerate(WAYS):
            for one in (row, f"{row}, longer"):
                figures += [*two(one, way), lists(one)[number]]
        text = (
            "Gemma -> SmolLM2 {}, {} and {}, trained longer {}, {} and {}; SmolLM2 -> Gemma {}, {} and {}, longer {}, "
            "{} and {}"
        )
        yield Sentence(f"docs/methods/{name}.md", text, figures)
    judges = [[at(made, "docs/benchmarks/judges.md", "", name, column)[0] for name in ("gcg", "arditi", "xstest")]
              for column in ("precision", "recall")]  # fmt: skip
    ours = [at(made, "docs/benchmarks/judges.md", "", "refusal", column)[0] for column in ("precision", "recall")]
    text = "ours has precision {} and recall {}, the lists {} to {} and {} to {}"
    yield Sentence("docs/evaluation.md", text, [*ours, *(pick(one) for one in judges for pick in (min, max))])
    yield _features(made)
    yield _states(made)


def _features(made: Pages) -> Sentence:
    equal, gemma, twin = "effect, at equal norm", "-> gemma-3-270m", "-> twin"

    def effect(row: str) -> str:
        return at(made, SAE, gemma, row, equal)[0]

    texts = [re.search(r"Carried over native: (\S+) \[(\S+), (\S+)\].*?in (\d+) of (\d+) cases",
                       made[SAE].split(section)[1], re.S) for section in (f"{gemma}\n", f"{twin} ")]  # fmt: skip
    assert all(texts)
    over, other = ([shown(float(one)) for one in found.groups()[:3]] for found in texts if found)
    drift = at(made, SAE, gemma, "random", "drift")[0]
    return Sentence(
        "docs/methods/sae-feature.md",
        "in the donor {} [{}, {}]; carried to Gemma {} [{}, {}], so {} [{}, {}] of it; mapped noise {}, wrongly paired "
        "rows {}, random {} at a drift of {}, published pinv {}, another feature's row {}. To the rotated twin {}. In "
        "{} of {} cases",
        [
            *at(made, SAE, gemma, "native, in the donor", equal),
            *at(made, SAE, gemma, "carried", equal),
            *over,
            effect("mapped noise"),
            effect("shuffled pairs"),
            effect("random"),
            drift,
            effect("carried by pinv (published)"),
            effect("another feature, carried"),
            other[0],
            *(texts[0].groups()[3:] if texts[0] else ()),
        ],
    )


def _states(made: Pages) -> Sentence:
    page = "docs/benchmarks/validation.md"
    ways = [line.removeprefix("## ") for line in made[page].splitlines() if line.startswith("## ") and "layer" in line]

    def all_of(row: str, column: str) -> list[str]:
        return [at(made, page, way, row, column)[0] for way in ways]

    ridge, ablated = (all_of(row, "choices") for row in ("ridge", "mean-ablation"))
    return Sentence(
        "docs/methods/mapping-states.md",
        "four layer pairs: {}, {}, {} and {} nats per token, where the mean state costs {}, {}, {} and {}; multiple "
        "choice {} to {} where unpatched is right in {} and the mean state in {} to {}",
        [
            *all_of("ridge", "KL"),
            *all_of("mean-ablation", "KL"),
            min(ridge),
            max(ridge),
            min(all_of("unpatched", "choices")),
            min(ablated),
            max(ablated),
        ],
    )


# -- vectors and probes -----------------------------------------------------------------------------------------------


def vectors(made: Pages) -> Iterator[Sentence]:
    """Yield what is said of carried vectors and probes."""
    cosine, auc, norm = "standardised cosine to the native vector", "AUC on held-out prompts", "length"

    def of(part: str, row: str, concept: str) -> list[list[str]]:
        """Return the cells of both ways, SmolLM2 -> Gemma first."""
        heads = [re.search(r"^\| \| (.*) \|$", made[VECTORS].split(f"{way}: {part}")[1], re.M) for way in WAYS[::-1]]
        column = next(one for one in (heads[0][1] if heads[0] else "").split(" | ") if one.startswith(f"{concept} ("))
        return [at(made, VECTORS, f"{way}: {part}", row, column) for way in WAYS[::-1]]

    def values(part: str, row: str, concept: str) -> list[str]:
        return [one[0] for one in of(part, row, concept)]

    mixed, both = "ridge, last tokens, mixed forms", "ridge, last tokens, mixed forms and third-party prompts"
    text, last, same = "sentiment, over the text", "sentiment, last token", "same model, other pairs"
    wrong = of(cosine, "shuffled pairs", "harmful")
    bounds = [float(one) for cell in wrong for one in cell[1:]]
    randoms, halves = values(cosine, "random", "harmful"), values(cosine, same, "harmful")
    yield Sentence(
        "docs/methods/carrying-directions.md",
        "mixed forms {} and {}, with 788 third-party prompts besides {} and {} (published pinv {} and {}; wrongly "
        "paired {} and {} with intervals from {} to {}, one draw a seed; random {}; two halves of the pairs in one "
        "model {})",
        [
            *values(cosine, mixed, "harmful"),
            *values(cosine, both, "harmful"),
            *values(cosine, "pinv, last tokens (published)", "harmful"),
            *(cell[0] for cell in wrong),
            shown(min(bounds)),
            shown(max(bounds)),
            max(randoms),
            max(halves),
        ],
    )
    yield Sentence(
        "docs/methods/carrying-directions.md",
        "over the text with word ends {} and {}, at the last token {} and {}",
        [*values(cosine, "ridge, word ends", text), *values(cosine, WAY_LAST, last)],
    )
    pairs = [(own, carried) for own, carried in
             ((values(auc, "native", concept), values(auc, CONCEPTS[concept].way, concept))
              for concept in ("harmful", text, last))]  # fmt: skip
    yield Sentence(
        "docs/methods/carrying-probes.md",
        "harmful requests {} against {} both ways; sentiment of film reviews, read over the text, {} against {} and {} "
        "against {}; read at the last token, {} against {} and {} against {}",
        [pairs[0][0][0], pairs[0][1][0]] + [one[way] for own in pairs[1:] for way in (0, 1) for one in own],
    )
    films = [one for concept in (text, last) for one in values(auc, "native", concept)]
    halves_of = [one for concept in (text, last) for one in values(cosine, same, concept)]
    yield Sentence(
        "docs/methods/probe.md",
        "{} for harmful against harmless requests, {} to {} for the sentiment",
        [min(values(auc, "native", "harmful")), min(films), max(films)],
    )
    yield Sentence(
        "docs/methods/difference-in-means.md",
        "a standardised cosine of {} for harmful against harmless requests (80 pairs each) and of {} to {} for",
        [max(halves), min(halves_of), max(halves_of)],
    )
    lengths = [
        float(one) for way in WAYS for line in made[VECTORS].split(f"{way}: {norm}")[1].split("\n## ")[0].splitlines()
        for one in re.findall(r"\| (\d\.\d+) \[", line)
    ]  # fmt: skip
    yield Sentence(
        "docs/methods/norm-relative-strength.md",
        "by rows and fit: {} to {} in",
        [shown(min(lengths)), shown(max(lengths))],
    )


WAY_LAST = CONCEPTS["sentiment, last token"].way


# -- through words ----------------------------------------------------------------------------------------------------


WORD_ARMS = {
    "unmodified": "unmodified",
    "**by context**": "context",
    "**by vocabulary**": "vocabulary",
    "few-shot prompt, {} to {} tokens a request": "few-shot",
    "trained on the donor's answers": "trained (rate 0.004)",
    "the donor with its adapter": "donor",
}


def words(made: Pages) -> Iterator[Sentence]:
    """Yield the rows of the README's table of behaviours carried through words, with the dearer of both behaviours."""

    def of(behaviour: str, arm: str, column: str, digits: int = 2) -> list[str]:
        section = f"-> qwen2.5-coder-0.5b-instruct: {behaviour}"
        return at(made, "docs/benchmarks/words.md", section, arm, column, digits=digits)

    listed, pirate = "numbered-list", "pirate"
    for title, arm in WORD_ARMS.items():
        asks = sorted(of(one, arm, "tokens a request", 0) for one in (listed, pirate)) if arm == "few-shot" else []
        figures = [token for one in asks for token in one]
        figures += [*of(listed, arm, listed), *of(listed, arm, "loops")[:1]]
        figures += [*of(pirate, arm, "pirate-opening"), *of(pirate, arm, pirate), *of(pirate, arm, "loops")[:1]]
        cost = [
            max((of(one, arm, column, digits) for one in (listed, pirate)), key=lambda told: [float(x) for x in told])
            for column, digits in (("seconds", 0), ("GB", 1))
        ]
        columns = "{} [{}, {}] | {} | {} [{}, {}] | {} [{}, {}] | {}"
        row = f"| {title} | {columns} | {'{} | {}' if cost[0] else ' | '} |"
        yield Sentence("README.md", row.replace("|  |", "| |").replace("|  |", "| |"), [*figures, *cost[0], *cost[1]])
    text = (
        "(`commandv distil --by auto`): in {}, by training in {}; lists in {} against {}. **A prompt of these sixteen "
        "brings** a dialect in {} and lists in {}, for {} to {} tokens a request. From such a donor of Gemma into "
        "SmolLM2 come lists by training in {}, by context in {}, openings in {} against {}."
    )
    into_gemma, into_smollm, many = (
        ("auto", "trained (rate 0.001)"),
        ("trained (rate 0.004)", "context"),
        ("many-shot",),
    )

    def into(recipient: str, name: str, column: str, arms: tuple[str, ...], digits: int = 2) -> list[str]:
        section = f"-> {recipient}: {name}"
        return [at(made, "docs/benchmarks/words.md", section, arm, column, digits=digits)[0] for arm in arms]

    gemma, smollm = "gemma-3-270m", "smollm2-135m-instruct"
    told = into(gemma, pirate, pirate, into_gemma) + into(gemma, listed, listed, into_gemma)
    told += into(gemma, pirate, pirate, many) + into(gemma, listed, listed, many)
    told += sorted(into(gemma, name, "tokens a request", many, 0)[0] for name in (listed, pirate))
    told += into(smollm, listed, listed, into_smollm) + into(smollm, pirate, "pirate-opening", into_smollm)
    yield Sentence("README.md", text, told)


def forecast(made: Pages) -> Iterator[Sentence]:
    """Yield what the README says of the forecast."""
    page = made["docs/benchmarks/forecast.md"]
    found = {
        left_out: re.search(rf"\| all five features \| {left_out} \| ([^|]*)", page)
        for left_out in ("pair of models", "donor")
    }
    figures = [figure for one in found.values() if one for figure in numbers(one[1])]
    text = (
        "an AUC of {} [{}, {}] on pairs of models that the forecast was not fitted on, {} [{}, {}] with another donor"
    )
    yield Sentence("README.md", text, figures)
