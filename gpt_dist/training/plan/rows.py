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


def gigabytes(size: float) -> str:
    """Bytes as ``6.23 GB``, small ones in MB; for columns."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
