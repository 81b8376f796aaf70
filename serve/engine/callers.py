"""What the callers of a server may use, and the jobs of each."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.engine.jobs import Job

PATIENCE = 60.0
"""A job without a deadline is treated as if it were due this many seconds after its arrival."""
PRIORITY_SECONDS = 10.0
"""A step of priority counts as much as this many seconds of waiting."""


@dataclass(frozen=True)
class Terms:
    """What one caller may use."""

    account: str = ""
    """Who shares these terms; "": the caller alone."""
    name: str = ""
    """For metrics and logs."""
    weight: float = 1.0
    """Its share of the tokens, relative to other callers."""
    running: int | None = None
    """Maximum number of sequences with a slot; None for no limit."""
    waiting: int | None = None
    """Maximum number of sequences without a slot; None for no limit."""

    def most(self, slots: int) -> int | None:
        """Maximum number of sequences, with ``slots`` slots; None for no limit."""
        if self.waiting is None:
            return None
        return self.waiting + (slots if self.running is None else min(self.running, slots))


NO_LIMITS = Terms()
"""What a caller may use that no limit is known for."""


def due(job: Job, now: float) -> float:
    """When a job that arrives now should have its slot: of one caller's jobs the earliest is next.

    The earliest deadline goes first. A lower priority is an earlier time. The value never changes,
    so what waits overtakes what arrives later with a lower priority: that is ageing.
    """
    times = [now + PATIENCE]
    times += [time for time in (job.deadline, job.ends_at) if time is not None]
    return min(times) + PRIORITY_SECONDS * job.priority


class Line:
    """The jobs of one caller.

    Args:
        terms: what it may use.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.slots = 0
        """How many of its jobs have a slot."""
        self._waiting: list[tuple[float, int, Job]] = []

    def __len__(self) -> int:
        return self.slots + len(self._waiting)

    @property
    def waiting(self) -> int:
        """Number of jobs without a slot."""
        return len(self._waiting)

    @property
    def first(self) -> tuple[int, Job] | None:
        """The job that is next, with its place in the order of arrival; None if there is none."""
        limit = self.terms.running
        if not self._waiting or (limit is not None and self.slots >= limit):
            return None
        _, number, job = self._waiting[0]
        return number, job

    def held(self, more: int = 0) -> float:
        """Slots that the caller has, with ``more`` of them, in relation to its weight."""
        return (self.slots + more) / self.terms.weight

    def owed(self, more: int = 0) -> float:
        """Jobs that wait, with ``more`` of them, in relation to the caller's weight."""
        return (self.waiting + more) / self.terms.weight

    def add(self, job: Job) -> None:
        """Let a job wait."""
        insort(self._waiting, (job.due, job.number, job))

    def drop(self, job: Job) -> None:
        """Take out a job that waits."""
        self._waiting.remove((job.due, job.number, job))

    def ahead(self, due: float) -> int:
        """Number of waiting jobs that are due earlier, or at the same time."""
        return sum(each[0] <= due for each in self._waiting)

    def newest(self, count: int) -> list[Job]:
        """At most ``count`` waiting jobs that have not begun, those that came last first."""
        fresh = [(number, job) for _, number, job in self._waiting if not job.began]
        return [job for _, job in sorted(fresh, key=lambda each: -each[0])[:count]]
