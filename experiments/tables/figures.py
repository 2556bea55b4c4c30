"""Whether every figure in README and docs is what the committed labels give, and writing those that are not anew."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from experiments.tables.cells import Sentence
from experiments.tables.pages import PAGES, ROOT
from experiments.tables.sentences import sentences

SLOT = r"(-?\d*\.?\d+)"
FIGURE = re.compile(r"(?<![\w.:/^-])-?\d*\.\d+(?![\w]|\.\d)")
# Where figures are no results: code, addresses, numbers of papers, sizes of downloads.
ASIDE = re.compile(
    r"```.*?```|`(?:[^`\n]|\n(?!\n))*`|\]\([^)]*\)|arXiv\s+[\d.]+|sections?\s+[\d.]+|https?://\S+|[\d.]+\s+[GM]B\b|"
    r"(?:Python|transformers|torch) \d[\d.]*|Licence: .*?\n\n",
    re.S,
)
NOT_READ = ("docs/cli.md",)  # generated from the code, and checked by the tests

WORDS = "docs/methods/carrying-through-words.md"
# Figures that were taken once and whose runs are not kept: (page, words around them).
BY_HAND = [
    ("docs/evaluation.md", "finds evidence in .51 and is right on .74 of these (.85 of the positive, .62 of the "
     "negative ones)"),
    ("docs/evaluation.md", "evidence in 39 and is right on .90 of them"),
    ("docs/method.md", "and .73 to .78 with line starts"),
    ("docs/methods/difference-in-means.md", "From 100 pairs the latter is .6 to .7"),
    ("docs/methods/ridge.md", "GCV gave .00 where leaving out whole prompts gave .73, and with another donor adapter "
     ".72 against .78"),
    (WORDS, "(dialect .03). One that acts along the whole answer (`--positions l1+g48`) speaks dialect in "
     ".55 of its"),
    (WORDS, "| few-shot prompt, 4 demonstrations; 8, 12, 16 of the strongest | Gemma | dialect .04; .29, .88, .92 |"),
    (WORDS, "| few-shot prompt, 16, 32, 64 of the strongest | Qwen 0.5B | dialect .19, .38, .38 |"),
    (WORDS, "| few-shot prompt, 48 of the strongest that repeat no words | Qwen 0.5B | dialect .56 |"),
    (WORDS, "| context, the default | Gemma | .88, .21, .08 |"),
    (WORDS, "| context, sets of 16 drawn, 24 tokens, rank 64 | Gemma | .83, .08, .17 |"),
    (WORDS, "| **context, sets of the 16 strongest, 24 tokens, rank 64** | Gemma | **.96, .83, .04** |"),
    (WORDS, "| the last, rank 16 | Gemma | .83, .71, .17 |"),
    (WORDS, "| the same as in bold | Qwen 0.5B | .81, .06, .19 |"),
    (WORDS, "| the same, from Gemma's answers, which repeat themselves | SmolLM2 | .46, .29, .54 |"),
    (WORDS, "| the same, demonstrations that repeat words left behind | SmolLM2 | .79, 0, .21 |"),
    (WORDS, "| the recipient's own answers after 16 demonstrations, in place of the donor's | Gemma | .83, .83, .17 |"),
    (WORDS, "| the same, after 32 | Qwen 0.5B | .94, 0, .06 |"),
    (WORDS, "| the same, after 16 of Gemma's | SmolLM2 | 1.00, 0, 0 |"),
    (WORDS, "| vocabulary with the donor's distribution as the target, 4 rounds; 8; 12 of rank 64 | SmolLM2 | "
     ".33, 0, .04; .79, .08, .08; .83, .04, .12 |"),
    (WORDS, "| the same, 4 rounds | Gemma | 0, 0, .25 |"),
    (WORDS, "| the same, 8 rounds after the context | Gemma | .08, .08, .29 |"),
    (WORDS, "| its target at some middle layers first; at the last five | SmolLM2 | .71, .08, .08; .54, .12, .38 |"),
    (WORDS, "| answers, 4 rounds | SmolLM2 | .29, .08, .67 |"),
    (WORDS, "| mean state along the answers minus along plain ones, added | Gemma | 0, 0, .54; the donor's "
     "answers become less likely |"),
    (WORDS, "| the shipped adapter as the donor | has no dialect itself (.03): the loops of an earlier look "
     "came with it and Gemma's own (.50) |"),
    (WORDS, "| gradient times variance, 3 rounds | KL 3.23 -> 1.23; opening 2.0 nats |"),
    (WORDS, "| Newton steps, 3 rounds, nothing cut | KL .81; a few places with huge steps decide all, "
     "lengths fall to .02 |"),
    (WORDS, "| Newton steps, cut at the median, 4 rounds | KL 2.40 -> .71; **opening .97, dialect .13, loops "
     "0**, 18 s of fitting |"),
    (WORDS, "| cut at .75 or not at all, cost 1 or 10 | KL higher after as many rounds |"),
    (WORDS, "| and words of the style in place of .7 of the ratio | opening 1.00, dialect .09, loops 0: "
     "nothing more; left out |"),
    (WORDS, "| the last, scale 1.4 | opening .91, dialect .28, loops .09 |"),
    (WORDS, "| the last, numbered list | list .22, loops .09 |"),
    (WORDS, "| cut at the mean, or the gradient where it is better | Llama, Gemma, GPT-2 of random weights: "
     ".39, .31, .36 of KL is left, in place of .40, .64, .80 |"),
    (WORDS, "| places in the donor's plain answers, too | opening .78, dialect .06: worse; left out |"),
    (WORDS, "| the last prompt token fitted apart | KL 1.02 as together; left out |"),
    ("docs/studies/README.md", "at 1.2 nats where .8 buy the same natively"),
]  # fmt: skip
# Pages with times that a script printed and a hand copied; no results are kept.
PAGES_BY_HAND = {
    "docs/benchmarks/serving.md": "benchmarks/serving.py",
    "docs/share.md": "benchmarks/sharing.py",
    "docs/run-elsewhere.md": "benchmarks/sharing.py",
}
# Numbers that are settings of the method or bounds that tests hold, and no results.
SETTINGS = [
    ("docs/evaluation.md", "below .05 where the interval leaves out 0"),
    ("docs/formats.md", "a cosine of .996 or more"),
    ("docs/method.md", "(0.05 s for 135M parameters in bfloat16)"),
    ("docs/methods/choosing.md", "depth is .8"),
    ("docs/run-elsewhere.md", "(.002 nats in float32)"),
    ("docs/methods/norm-relative-strength.md", "shares from -.3 to .3"),
    ("docs/methods/probe.md", "10, 1, .1, .01, .001"),
    ("docs/methods/ridge.md", "10^2.75"),
]


@dataclass
class Made:
    """What README and docs should be.

    Attributes:
        pages: path -> text, of those that are made whole and those with sentences in them.
        problems: what no writing anew mends: a sentence that a page lacks, a figure that nothing makes.
    """

    pages: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def pattern(text: str, slot: str = SLOT) -> re.Pattern[str]:
    """Return what finds a sentence in a page, with a group for each figure."""
    parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in text.split("{}")]
    return re.compile(slot.join(parts))


def placed(page: str, sentence: Sentence, problems: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Return the page with the sentence's figures in it, and where they are."""
    found = list(pattern(sentence.text).finditer(page))
    if len(found) != 1 or found[0].re.groups != len(sentence.figures):
        problems.append(
            f"{sentence.page}: found {len(found)} times: {sentence.text!r}; reword it in the page or in "
            "experiments/tables/sentences.py"
        )
        return page, []
    spans = [found[0].span(i) for i in range(1, len(sentence.figures) + 1)]
    for (start, end), figure in zip(reversed(spans), reversed(sentence.figures), strict=True):
        page = page[:start] + figure + page[end:]
    again = pattern(sentence.text).search(page)
    assert again is not None
    return page, [again.span(i) for i in range(1, len(sentence.figures) + 1)]


def whole() -> dict[str, str]:
    """Make the pages that are made whole."""
    return {page: make() for page, make in PAGES.items()}


def made(whole: Mapping[str, str]) -> Made:
    """Put the figures of pages that are made whole, and of labels, into all others."""
    out, known = Made(dict(whole)), list(sentences(whole))
    for sentence in known:
        text = out.pages.get(sentence.page) or (ROOT / sentence.page).read_text("utf-8")
        out.pages[sentence.page], _ = placed(text, sentence, out.problems)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        name = path.relative_to(ROOT).as_posix()
        if name not in {*whole, *NOT_READ, *PAGES_BY_HAND}:
            text = out.pages.get(name) or path.read_text("utf-8")
            out.problems += strays(name, text, [one for one in known if one.page == name])
    return out


def strays(name: str, text: str, known: list[Sentence]) -> Iterator[str]:
    """Yield figures of a page that no sentence makes."""
    spans = [found.span() for found in ASIDE.finditer(text)]
    for sentence in known:
        spans += placed(text, sentence, [])[1]
    for page, words in (*BY_HAND, *SETTINGS):
        if page == name:
            spans += [found.span() for found in pattern(words).finditer(text)]
    for found in FIGURE.finditer(text):
        if not any(start <= found.start() and found.end() <= end for start, end in spans):
            line = text[: found.start()].count("\n") + 1
            yield (
                f"{name}:{line}: nothing makes the figure {found[0]}; say where it comes from in "
                "experiments/tables/sentences.py"
            )


def differing(found: Made) -> list[str]:
    """Return what is wrong with README and docs, a line each."""
    stale = [page for page, text in found.pages.items() if not (ROOT / page).exists()
             or (ROOT / page).read_text("utf-8") != text]  # fmt: skip
    return [f"{page}: not what the committed labels give; run make tables" for page in stale] + found.problems


def write(found: Made) -> list[str]:
    """Write README and docs; return what that does not mend."""
    for page, text in found.pages.items():
        (ROOT / page).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / page).write_text(text, "utf-8")
    return found.problems
