"""The jobs of a scheduler, and which of them comes next."""

from __future__ import annotations

import threading
from collections.abc import Callable

from serve.engine.jobs import Job, QueueFull, Scoring, Sequence


class Queue:
    """All jobs in order of arrival, those that have a slot included. Any thread may use it.

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
            self._jobs.update(dict.fromkeys(jobs))

    def next(self) -> Job | None:
        """The job that gets the next slot."""
        with self._lock:
            return next((job for job in self._jobs if job.slot < 0), None)

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
