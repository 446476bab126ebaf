"""Helpers for tests of reports."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

NO_END_TAG = {"meta", "br", "link", "img", "hr"}


def step(at: int, speed: float = 1000.0, data: float = 0.25, teacher: float = 0.5, **losses: float) -> dict[str, Any]:
    """A step of a run's log."""
    return {
        "event": "step",
        "step": at,
        "losses": losses or {"ce": 1.0, "total": 1.0},
        "images_per_s": speed,
        "data_share": data,
        "teacher_share": teacher,
    }


def validation(epoch: int, top1: float) -> dict[str, Any]:
    """A validation in a run's log."""
    return {"event": "validation", "step": epoch * 10, "epoch": epoch, "epochs": 4, "top1": top1, "top5": 99.0}


class Balance(HTMLParser):
    """Checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in NO_END_TAG:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """A tag that closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def well_formed(page: str) -> list[ElementTree.Element]:
    """Checks the tags of a page and the numbers in its figures; returns the figures."""
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert not parser.open
    figures = [
        ElementTree.fromstring(s) for s in re.findall(r'<svg class="figure".*?</svg>(?=<ul|</figure>)', page, re.DOTALL)
    ]
    assert len(figures) == page.count('<svg class="figure"')
    for swatch in re.findall(r"<svg width.*?</svg>(?=[^<]*</li>)", page):
        ElementTree.fromstring(swatch)
    assert not re.search(r"\b(nan|inf)\b", "".join(ElementTree.tostring(f, "unicode") for f in figures))
    return figures


def cells(page: str) -> list[list[str]]:
    """The rows of all tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
