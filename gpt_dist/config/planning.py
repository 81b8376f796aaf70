"""Options that mean something only with ``--dry-run``: the machines to plan for."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from gpt_dist.errors import UsageError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class PlanOptions(NamedTuple):
    """What to plan for. None stands for what this machine has."""

    ranks: int | None = None
    """Number of ranks, a GPU each."""
    mfu: float | None = None
    """Model FLOPs utilisation, the share of a device's peak that training uses."""
    device_memory: float | None = None
    """Memory of one device, in bytes."""


def whole_number(text: str) -> int:
    """``8``."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("a whole number from 1 on")
    return int(text)


def share(text: str) -> float:
    """``0.4`` or ``40%``."""
    match = re.fullmatch(r"([0-9.]+)(%?)", text)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError("a share above 0 and up to 1, for example 0.4 or 40%")
    return value


def memory_size(text: str) -> float:
    """``80GB`` (10⁹ bytes), ``80GiB`` (2³⁰ bytes) or a number of bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?", text.lower())
    size = float(match[1]) * (UNITS | BINARY)[match[2] or ""] if match else 0.0
    if size <= 0:
        raise ValueError("a size such as 80GB or 24GiB")
    return size


PARSERS = {"ranks": whole_number, "mfu": share, "device-memory": memory_size}
"""Flag → function that parses its value. It raises ValueError with what is valid."""

HELP = {
    "ranks": ("N", "plan for N ranks (default: those that torchrun started, or 1)"),
    "mfu": ("SHARE", "share of the device's peak that training uses, for the time (default: 40%%)"),
    "device-memory": ("SIZE", "memory of one device, such as 80GB (default: that of the GPU here)"),
}


def plan_options(texts: dict[str, str], *, dry_run: bool) -> PlanOptions:
    """The options of a command line.

    Args:
        texts: flag → value as typed.
        dry_run: whether ``--dry-run`` was given.

    Raises:
        UsageError: a value is not valid, or there is no ``--dry-run``; a line for each.
    """
    values: dict[str, Any] = {}
    problems = []
    for flag, text in texts.items():
        try:
            values[flag.replace("-", "_")] = PARSERS[flag](text)
        except ValueError as error:
            problems.append(f"--{flag} {text}: valid is {error}")
        if not dry_run:
            problems.append(f"--{flag}: valid only with --dry-run")
    if problems:
        raise UsageError("\n".join(problems))
    return PlanOptions(**values)
