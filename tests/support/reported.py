"""Reports of made-up runs."""

from __future__ import annotations

import html.parser

import numpy as np

import runs
from commandv.evaluation.report import write_report
from commandv.evaluation.results import Cell

VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use"}


class Page(html.parser.HTMLParser):
    """Collects what the tests look at; complains of tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.text = [], [], [], [], []
        self.tables, self.rows = {}, []
        self.source = text
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if "caption" in self.open and data.strip():
            self.caption = data
        elif {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


def written(run, tmp_path):
    page, twin = write_report(run, tmp_path)
    return Page(page.read_text("utf-8")), twin.read_text("utf-8")


def made(rates, *, seed=0, unit="rate", success="more", **changes):
    arms = runs.arms(rates, "t", np.random.default_rng(seed), unit=unit)
    content = {"arms": arms, "settings": {"success": {"t": success}}}
    return Cell(donor="a", recipient="b", behaviour="t", seed=seed, **(content | changes))
