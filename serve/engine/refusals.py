"""Why the scheduler does not take a job."""

from __future__ import annotations

from serve.engine.callers import Terms


class QueueFull(Exception):
    """The queue has no room for all of the jobs; none was submitted."""


class CallerFull(Exception):
    """A caller has as many jobs as it may have; none was submitted.

    Args:
        limit: which of its limits is reached: "running" or "waiting".
        terms: of the caller.
    """

    def __init__(self, limit: str, terms: Terms) -> None:
        super().__init__(limit)
        self.limit, self.terms = limit, terms


class TooLate(Exception):
    """A job could not end before its deadline; none was submitted.

    Args:
        seconds: how long it would take at least.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"it takes at least {seconds:.3g} s")
        self.seconds = seconds


Refusal = QueueFull | CallerFull | TooLate
REFUSALS = (QueueFull, CallerFull, TooLate)
