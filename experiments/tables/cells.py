"""Figures out of the tables of pages that are made whole, and the sentences they go into."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

Pages = Mapping[str, str]


class Sentence(NamedTuple):
    """A piece of a page and its figures, in order."""

    page: str
    text: str
    figures: list[str]


def shown(value: float, digits: int = 2) -> str:
    """Write a figure as prose has it: no 0 before the point."""
    return re.sub(r"^(-?)0(?=\.)", r"\1", f"{value:.{digits}f}")


def at(made: Pages, page: str, section: str, row: str, column: str, *, nth: int = 0, digits: int = 2) -> list[str]:
    """Return the numbers of a table's cell: value, and low and high where it has an interval.

    Args:
        made: pages by path.
        page: path of the page.
        section: words in the heading under which the table is; "" for the whole page.
        row: what the row begins with.
        column: head of the column.
        nth: which of the tables with such a row and column.
        digits: after the point.
    """
    found = [rows[row] for rows in _columns(made, page, section, column) if row in rows]
    return numbers(found[nth], digits)


def whole_column(made: Pages, page: str, section: str, column: str, nth: int = 0) -> list[list[str]]:
    """Return the numbers of a table's column, row by row; arguments as in `at`."""
    return [numbers(cell) for cell in _columns(made, page, section, column)[nth].values()]


def numbers(cell: str, digits: int = 2) -> list[str]:
    """Return the numbers of a table's cell."""
    return [shown(float(number), digits) for number in re.findall(r"-?\d*\.?\d+(?:e[-+]\d+)?", cell)]


def _columns(made: Pages, page: str, section: str, column: str) -> list[dict[str, str]]:
    """Return the column of every table that has it: row -> cell, the first where rows have one name."""
    parts = re.split(r"^#+ ", made[page], flags=re.M)
    text = next(part for part in parts if section in part.partition("\n")[0]) if section else made[page]
    out = []
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        lines = [line.strip().strip("|").split("|") for line in table.splitlines()]
        head, _, *rows = [[cell.strip(" *") for cell in line] for line in lines]
        if column in head:
            out.append({row[0]: row[head.index(column)] for row in reversed(rows)})
    return out
