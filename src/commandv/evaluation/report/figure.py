"""The report's one picture, effect against price, as inline SVG: text stays text, colours are the style sheet's."""

from __future__ import annotations

import html
import io
import math
import re
from typing import Any

from commandv.errors import InputError
from commandv.evaluation.arms import UNMODIFIED
from commandv.evaluation.report.findings import Table

SIZE = (4.9, 3.9)  # inches; at 72 units to the inch the text's size is that of a phone's page
WIDE = 30.0  # prices that differ by more than this factor are drawn on a scale that is logarithmic away from 0
INK, RULE = "#010101", "#010102"  # colours that matplotlib writes and `_themed` replaces by the style sheet's
COLOURS = [f"#0102{i:02x}" for i in range(8)]
THEME = {INK: "currentColor", RULE: "var(--rule)"} | {one: f"var(--series-{i})" for i, one in enumerate(COLOURS)}
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")


def require_matplotlib() -> None:
    """Check that figures can be drawn."""
    try:
        import matplotlib.backends.backend_svg  # noqa: F401
    except ImportError:
        raise InputError("a report's figures need matplotlib: pip install 'commandv[report]'") from None


def effect_against_price(table: Table, label: str, name: str) -> str:
    """Draw every arm of a table that has a price by what it does and what it costs, both with 95 % intervals.

    The unmodified recipient costs nothing. `label` says the figure in words, `name` is unique on the page.

    Returns:
        SVG, empty when no arm has a price.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [(row, row.found.score, row.price.get("kl")) for row in table.rows if row.found and row.arm != "donor"]
    if all(kl is None for _, _, kl in rows):
        return ""
    style: Any = {
        "text.parse_math": False,  # names may hold dollars
        "svg.fonttype": "none", "svg.hashsalt": "commandv", "font.size": 11, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "text.color": INK,
        "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for i, (row, score, kl) in enumerate(rows):
            if kl is None and row.arm != UNMODIFIED:
                continue
            x = kl.value if kl else 0.0
            axes.errorbar(
                [x], [score.value], xerr=[[_length(x, kl.low)], [_length(kl.high, x)]] if kl else None,
                yerr=[[_length(score.value, score.low)], [_length(score.high, score.value)]], label=row.arm,
                fmt=MARKERS[i % len(MARKERS)], color=COLOURS[(i - 1) % len(COLOURS)] if i else INK,
                markersize=7, linewidth=1.4,
            )  # fmt: skip
        positive = [kl.value for _, _, kl in rows if kl and kl.value > 0 and math.isfinite(kl.value)]
        if positive and max(positive) > WIDE * min(positive):
            near = max(min(positive), max(positive) / 1000)
            axes.set_xscale("symlog", linthresh=near)
            exponents = range(math.ceil(math.log10(near)), math.floor(math.log10(max(positive))) + 2)
            ticks = [0, *(10.0**exponent for exponent in exponents)]  # none in the linear part, close to 0
            axes.set_xticks(ticks, labels=[f"{one:g}" for one in ticks])  # matplotlib's own are formulas
            axes.set_xlim(-near / 2, 1.3 * max(positive))  # left, room for the unmodified model, which costs nothing
        axes.set_xlabel("price: KL to unmodified, nats per token")
        axes.set_ylabel("share of answers" if table.unit == "rate" else table.unit)
        if table.unit == "rate":
            axes.set_ylim(-0.04, 1.04)
        drawn: tuple[list[Any], list[str]] = axes.get_legend_handles_labels()
        figure.legend(
            [points for points, *_ in drawn[0]],  # without intervals, which make one mark look like another
            drawn[1],
            loc="outside lower center",
            ncols=3 if max(len(row.arm) for row, *_ in rows) < 20 else 1,
            frameon=False,
            fontsize=10,
            columnspacing=1.0,
        )
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _themed(file.getvalue(), label, name)


def _length(upper: float, lower: float) -> float:
    """Return an error bar's length; 0 where the interval is unknown or boundless."""
    length = upper - lower
    return length if math.isfinite(length) and length > 0 else 0.0


def _themed(svg: str, label: str, name: str) -> str:
    """Make matplotlib's SVG part of a page: ids of its own, the page's colours and font, no namespaces, a label."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    opening = f'<svg class="plot" viewBox="{box[1]}" role="img" aria-label="{html.escape(label, quote=True)}">'
    svg = re.sub(r"^<svg[^>]*>", lambda _: opening, svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, themed in THEME.items():
        svg = svg.replace(colour, themed)
    return svg.strip()
