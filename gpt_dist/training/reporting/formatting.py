"""Numbers for people: counts, bytes and durations in a few characters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def human(number: float) -> str:
    """1234567 → ``1.23M``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def counted(count: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``, ``3 batches``."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"


def short_names(paths: Iterable[str | Path]) -> list[str]:
    """The last part of each path; the whole paths where two end alike."""
    whole = [str(path) for path in paths]
    names = [Path(path).resolve().name for path in whole]
    return names if len(set(names)) == len(names) else whole


def file_size(count: float) -> str:
    """1990000000 bytes → ``1.99 GB``."""
    for unit, bytes_ in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= bytes_:
            return f"{count / bytes_:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def clock(seconds: float) -> str:
    """3725 → ``1:02:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
