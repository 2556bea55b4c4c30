"""Figures as inline SVG: text stays text, colours are those of the page's style sheet, so that dark mode holds."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from commandv.errors import InputError
from commandv.evaluation.report.curves import Tried, lines
from commandv.evaluation.report.findings import ORDER, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.9, 4.4)  # inches; at 72 units to the inch the text's size is that of a phone's page
FLOOR = -1.0  # R² below it are drawn at it, or one bad layer flattens all others
MOST_WRITTEN = 14  # layers; with more the heat map's cells have no room for figures
WIDE = 30.0  # prices that differ by more than this factor are drawn on a scale that is logarithmic away from 0

# Colours that matplotlib writes and `_themed` replaces by the style sheet's.
INK, RULE, HEAT, BAD = "#010101", "#010102", "#010103", "#010104"
THEME = {INK: "currentColor", RULE: "var(--rule)", HEAT: "var(--heat)", BAD: "var(--bad)"}
N_COLOURS = 8
COLOURS = [f"#0102{i:02x}" for i in range(N_COLOURS)]
THEME |= {colour: f"var(--series-{i})" for i, colour in enumerate(COLOURS)}
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")
DASHES = ("-", "--", ":", "-.")


def effect_against_price(table: Table, points: Sequence[Tried], label: str, name: str) -> str:
    """Draw effect against price: settings of the development split as lines, test figures with their intervals.

    Args:
        table: test figures; those without a price are left out, the unmodified recipient costs nothing.
        points: settings that were tried.
        label: what the figure shows, in words.
        name: unique on the page.

    Returns:
        SVG, empty when there is nothing to draw.
    """
    rows = [(row, row.price.get("kl")) for row in table.rows if row.found and row.method != "donor"]
    drawn = [(row, kl) for row, kl in rows if kl is not None or row.method == "unmodified"]
    if not points and all(kl is None for _, kl in drawn):
        return ""

    styles = _styles([one.method for one in points] + [row.method for row, _ in drawn])

    def draw(axes: Axes) -> None:
        choices = list(dict.fromkeys(layers for _, layers in lines(points)))
        for (method, layers), own in lines(points).items():
            dash = DASHES[choices.index(layers) % len(DASHES)]
            colour, marker = styles[method]
            axes.plot(
                [one.kl for one in own], [one.value for one in own], dash, color=colour, linewidth=1.2,
                marker=marker, markersize=5, markerfacecolor="none", label=f"{method}, {layers}, dev",
            )  # fmt: skip
        for row, kl in drawn:
            assert row.found is not None
            score, x = row.found.score, kl.value if kl else 0.0
            colour, marker = styles[row.method]
            across = [[_arm(x, kl.low)], [_arm(kl.high, x)]] if kl else None
            axes.errorbar(
                [x], [score.value], xerr=across, yerr=[[_arm(score.value, score.low)], [_arm(score.high, score.value)]],
                fmt=marker, color=colour, markersize=7, linewidth=1.4,
                label=f"{row.method}, test",
            )  # fmt: skip
        prices = [one.kl for one in points] + [kl.value for _, kl in drawn if kl]
        positive = [one for one in prices if one > 0 and math.isfinite(one)]
        if positive and max(positive) > WIDE * min(positive):
            near = max(min(positive), max(positive) / 1000)
            axes.set_xscale("symlog", linthresh=near)
            exponents = range(math.ceil(math.log10(near)), math.floor(math.log10(max(positive))) + 2)
            axes.set_xticks([0, *(10.0**exponent for exponent in exponents)])  # none in the linear part, close to 0
            axes.set_xlim(-near / 2, 1.3 * max(positive))  # left, room for the unmodified model, which costs nothing
        axes.set_xlabel("price: KL to unmodified, nats per token")
        axes.set_ylabel("share of answers" if table.unit == "rate" else table.unit)
        if table.unit == "rate":
            axes.set_ylim(-0.04, 1.04)

    return _svg(draw, label, name, legend=True)


def quality_by_layer(layers: Mapping[str, Mapping[int, float]], label: str, name: str) -> str:
    """Draw held-out R² against the recipient's layer, a line per method; empty when there is nothing to draw."""
    if not any(math.isfinite(value) for one in layers.values() for value in one.values()):
        return ""

    styles = _styles(layers)

    def draw(axes: Axes) -> None:
        for method, values in layers.items():
            colour, marker = styles[method]
            axes.plot(
                list(values), [max(value, FLOOR) for value in values.values()], color=colour,
                marker=marker, markersize=5, linewidth=1.4, label=method,
            )  # fmt: skip
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("recipient layer")
        axes.set_ylabel("held-out R²")
        axes.set_ylim(top=1.02)
        _whole_numbers(axes.xaxis)

    return _svg(draw, label, name, legend=True)


def heat_map(pairs: Mapping[tuple[int, int], float], label: str, name: str) -> str:
    """Draw R² by donor layer (upwards) and recipient layer; pairs that were not used stay empty."""
    if not pairs:
        return ""
    from matplotlib.patches import Rectangle

    rows, columns = ([pair[i] for pair in pairs] for i in (0, 1))

    def draw(axes: Axes) -> None:
        for (donor, recipient), value in pairs.items():
            if math.isfinite(value):
                colour, strength = (HEAT, 0.08 + 0.92 * min(value, 1.0)) if value >= 0 else (BAD, 0.45)
                corner = (recipient - 0.5, donor - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="none", alpha=strength))
            if max(_span(rows), _span(columns)) <= MOST_WRITTEN:
                text = f"{value:.2f}" if value > -10 else f"{value:.0f}"
                axes.text(recipient, donor, text.replace("0.", "."), ha="center", va="center", fontsize=9, color=INK)
        axes.set_xlim(min(columns) - 0.5, max(columns) + 0.5)
        axes.set_ylim(min(rows) - 0.5, max(rows) + 0.5)
        axes.set_xlabel("recipient layer")
        axes.set_ylabel("donor layer")
        for axis in (axes.xaxis, axes.yaxis):
            _whole_numbers(axis)
        axes.grid(False)

    return _svg(draw, label, name, legend=False)


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib.backends.backend_svg  # noqa: F401
    except ImportError:
        raise InputError("a report's figures need matplotlib: pip install 'commandv[report]'") from None


def _span(values: Sequence[int]) -> int:
    return max(values) - min(values) + 1


def _arm(upper: float, lower: float) -> float:
    """Return an error bar's length; 0 where the interval is unknown or boundless."""
    length = upper - lower
    return length if math.isfinite(length) and length > 0 else 0.0


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(10, integer=True))


def _styles(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return method -> (colour, marker): its own for a method of ORDER, for others what the figure has left."""
    methods = list(dict.fromkeys(methods))
    places = {method: ORDER.index(method) for method in methods if method in ORDER}
    free = [place for place in range(1, len(ORDER)) if place not in places.values()]
    others = [method for method in methods if method not in places]
    places |= {method: free[i % len(free)] if free else i + 1 for i, method in enumerate(others)}
    return {
        method: (COLOURS[(place - 1) % N_COLOURS] if place else INK, MARKERS[place % len(MARKERS)])
        for method, place in places.items()
    }


def _svg(draw: Callable[[Axes], None], label: str, name: str, *, legend: bool) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

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
        draw(axes)
        if legend:
            figure.legend(
                loc="outside lower center", ncols=2, frameon=False, fontsize=10, handlelength=1.8, columnspacing=1.0
            )
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _themed(file.getvalue(), label, name)


def _themed(svg: str, label: str, name: str) -> str:
    """Make matplotlib's SVG part of a page: ids of its own, the page's colours and font, no namespaces, a label."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # a style inside the page would hold for all of it
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
