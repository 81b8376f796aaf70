"""The parts of a call, for traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Phase:
    """A part of a call. Times are in nanoseconds since 1970."""

    name: str
    began: int
    ended: int
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
