"""Rows of a report: a label and a text, in lines of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import NamedTuple

WIDTH = 80
LABEL = 13
"""Columns of the labels and the space behind them."""


class Row(NamedTuple):
    """A label, empty where the row above goes on, and what it says."""

    label: str
    text: str


def render(rows: Iterable[Row]) -> str:
    """The rows as text. One that is too long is broken between words and goes on below."""
    lines: list[str] = []
    for label, text in rows:
        parts = [text]
        if len(text) > WIDTH - LABEL:
            parts = textwrap.wrap(
                text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False
            )
        for number, part in enumerate(parts):
            lines.append(f"{label if not number else '':<{LABEL}}{part}".rstrip())
    return "\n".join(lines)


def column(sizes: list[float]) -> list[str]:
    """Numbers of bytes in one unit, GB or MB, as their sum asks for."""
    unit, name = (1e9, "GB") if sum(sizes) >= 5e8 else (1e6, "MB")
    return [f"{size / unit:.2f} {name}" for size in sizes]
