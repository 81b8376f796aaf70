"""The jobs of a scheduler, and which of them comes next."""

from __future__ import annotations

import threading
from collections.abc import Callable

from serve.engine.jobs import Job, QueueFull, Scoring, Sequence

ACCOUNTS = 10_000
"""So many callers are remembered, those that came last."""


class Queue:
    """All jobs, those that have a slot included, shared fairly by their callers.

    The next slot goes to the caller that was served the fewest tokens (start-time fair queueing,
    Goyal, Vin and Cheng 1996), and to that caller's jobs in order of arrival. Who comes back after
    a pause has saved nothing up: its account begins where the one that was served last stands.

    Any thread may use it.

    Args:
        capacity: maximum number of jobs.
        clock: the time in seconds.
    """

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs: dict[Job, None] = {}
        self._released, self._interval = clock(), 1.0
        self._served: dict[str, int] = {}
        """Tokens computed for each caller, counted from where its account began."""
        self._level = 0
        """The account of the caller whose turn it was last."""

    def __len__(self) -> int:
        return len(self._jobs)

    def all(self) -> list[Job]:
        """The jobs in order of arrival."""
        with self._lock:
            return list(self._jobs)

    @property
    def waiting(self) -> int:
        """Number of jobs that have no slot."""
        return sum(job.slot < 0 for job in self.all())

    @property
    def retry_after(self) -> float:
        """Estimated seconds until a job ends, from recent ones."""
        return min(max(self._interval, 0.1), 10.0)

    def add(self, jobs: list[Sequence] | list[Scoring]) -> None:
        """Append jobs, all or none.

        Raises:
            QueueFull: there is no room for all of them.
        """
        with self._lock:
            if len(self._jobs) + len(jobs) > self.capacity:
                raise QueueFull
            busy = {job.caller for job in self._jobs}
            for caller in {job.caller for job in jobs} - busy:
                account = max(self._served.pop(caller, 0), self._level)
                self._served[caller] = account  # at the end: it is the latest to come
            self._jobs.update(dict.fromkeys(jobs))
            for caller in list(self._served)[: max(0, len(self._served) - ACCOUNTS)]:
                if caller not in busy:
                    del self._served[caller]

    def next(self) -> Job | None:
        """The job that gets the next slot."""
        first: dict[str, Job] = {}
        with self._lock:
            for job in self._jobs:
                if job.slot < 0:
                    first.setdefault(job.caller, job)
            if not first:
                return None
            caller = min(first, key=self._served.__getitem__)
            self._level = max(self._level, self._served[caller])
            return first[caller]

    def charge(self, job: Job, tokens: int) -> None:
        """Note that tokens were computed for a job."""
        with self._lock:
            self._served[job.caller] += tokens

    def remove(self, job: Job) -> None:
        """Take out a job that has ended."""
        now = self._clock()
        self._interval += 0.1 * (min(now - self._released, 10.0) - self._interval)
        self._released = now
        with self._lock:
            del self._jobs[job]

    def clear(self) -> list[Job]:
        """Take out all jobs."""
        with self._lock:
            jobs, self._jobs = self._jobs, {}
        return list(jobs)
