"""The jobs of a scheduler: which of them comes next, and which gives way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import islice

from serve.engine.callers import Line, Terms, due
from serve.engine.jobs import Job, Scoring, Sequence
from serve.engine.refusals import CallerFull, QueueFull

ACCOUNTS = 10_000
"""So many callers are remembered, those that came last."""


class Queue:
    """All jobs, those that have a slot included, shared fairly by their callers.

    The next slot goes to the caller that was served the fewest tokens in relation to its weight
    (start-time fair queueing, Goyal, Vin and Cheng 1996), and to that caller's jobs in the order of
    `serve.engine.callers.due`. Who comes back after a pause has saved nothing up: its account
    begins where the one that was served last stands.

    Any thread may use it.

    Args:
        capacity: maximum number of jobs.
        clock: the time in seconds.
        slots: number of slots.
    """

    def __init__(self, capacity: int, clock: Callable[[], float], slots: int = 1) -> None:
        self.capacity, self.slots = capacity, slots
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs: dict[Job, None] = {}
        self._lines: dict[str, Line] = {}
        """Those of callers that have jobs."""
        self._displaced: list[Job] = []
        self._count = 0
        self._released, self._interval = clock(), 1.0
        self._served: dict[str, float] = {}
        """Tokens computed for each account, by weight, counted from where it began."""
        self._level = 0.0
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
        with self._lock:
            return sum(line.waiting for line in self._lines.values())

    def by_caller(self) -> list[tuple[str, int, int]]:
        """Name, running and waiting jobs of each caller that has any."""
        with self._lock:
            lines = list(self._lines.values())
        return [(line.terms.name, line.slots, line.waiting) for line in lines]

    @property
    def retry_after(self) -> float:
        """Estimated seconds until a job ends, from recent ones."""
        return min(max(self._interval, 0.1), 10.0)

    def check(self, account: str, terms: Terms, count: int = 1) -> None:
        """Check that there is room for more jobs of a caller.

        Raises:
            CallerFull: a limit of this caller is reached.
            QueueFull: the queue has no room for all of them.
        """
        with self._lock:
            self._givers(account, terms, count)

    def add(self, jobs: list[Sequence] | list[Scoring]) -> None:
        """Append jobs of one caller, all or none.

        If the queue is full, the newest jobs of the caller that has the most waiting give way,
        as long as it still has as many as the other.

        Raises:
            CallerFull: a limit of this caller is reached.
            QueueFull: the queue has no room for all of them.
        """
        account, terms = jobs[0].account, jobs[0].terms
        now = self._clock()
        with self._lock:
            for other in self._givers(account, terms, len(jobs)):
                self._take_out(other)
                self._displaced.append(other)
            if account not in self._lines:
                self._open(account, terms)
            line = self._lines[account]
            line.terms = terms
            for job in jobs:
                self._count += 1
                job.number, job.due = self._count, due(job, now)
                self._jobs[job] = None
                line.add(job)

    def _open(self, account: str, terms: Terms) -> None:
        """Begin a line for a caller that has no jobs."""
        served = max(self._served.pop(account, 0.0), self._level)
        self._served[account] = served  # at the end: it is the latest to come
        self._lines[account] = Line(terms)
        if len(self._served) > ACCOUNTS:
            oldest = islice(self._served, len(self._lines) + 1)
            for other in [each for each in oldest if each not in self._lines][:2]:
                del self._served[other]

    def _givers(self, account: str, terms: Terms, count: int) -> list[Job]:
        """The jobs that have to leave so that a caller can add some."""
        line = self._lines.get(account) or Line(terms)
        most = terms.most(self.slots)
        if most is not None and len(line) + count > most:
            raise CallerFull(
                "waiting" if terms.waiting or terms.running is None else "running", terms
            )
        excess = len(self._jobs) + count - self.capacity
        if excess <= 0:
            return []
        fullest = max(self._lines.values(), key=lambda each: each.owed(), default=line)
        givers = fullest.newest(excess)
        enough = len(givers) == excess and fullest.owed(-excess) >= line.owed(count)
        if fullest is line or not enough:
            raise QueueFull
        return givers

    def displaced(self) -> list[Job]:
        """Take the jobs that had to leave for those of other callers."""
        with self._lock:
            jobs, self._displaced = self._displaced, []
        return jobs

    def next(self) -> Job | None:
        """The job that gets the next slot; None if no job may have one."""
        with self._lock:
            firsts = [
                (self._served[account], *first)
                for account, line in self._lines.items()
                if (first := line.first) is not None
            ]
        return min(firsts, key=lambda each: each[:2])[2] if firsts else None

    def victim(self, running: Iterable[Sequence]) -> Sequence | None:
        """The sequence that gives its slot to `next`, when none is free.

        It is the cheapest to compute again of the caller that holds the most slots in relation to
        its weight. That caller keeps at least as many as the other then has.
        """
        job = self.next()
        if job is None:
            return None
        with self._lock:
            own = self._lines[job.account]

            def held(each: Sequence) -> float:
                return self._lines[each.account].held()

            most = max(running, key=lambda each: (held(each), -each.length), default=None)
            if most is None:
                return None
            line = self._lines[most.account]
            return most if line is not own and line.held(-1) >= own.held(1) else None

    def start(self, job: Job, slot: int) -> None:
        """Note that a job has got a slot."""
        with self._lock:
            self._level = max(self._level, self._served[job.account])
            line = self._lines[job.account]
            line.drop(job)
            line.slots += 1
            job.slot, job.began = slot, True

    def put_back(self, job: Job) -> None:
        """Let a job that has lost its slot wait again, in its old place."""
        with self._lock:
            line = self._lines[job.account]
            line.slots -= 1
            job.slot = -1
            line.add(job)

    def charge(self, job: Job, tokens: int) -> None:
        """Note that tokens were computed for a job."""
        with self._lock:
            self._served[job.account] += tokens / job.terms.weight

    def remove(self, job: Job) -> None:
        """Take out a job that has ended."""
        now = self._clock()
        self._interval += 0.1 * (min(now - self._released, 10.0) - self._interval)
        self._released = now
        with self._lock:
            self._take_out(job)
            job.slot = -1

    def _take_out(self, job: Job) -> None:
        del self._jobs[job]
        line = self._lines[job.account]
        if job.slot >= 0:
            line.slots -= 1
        else:
            line.drop(job)
        if not len(line):
            del self._lines[job.account]

    def ahead(self, job: Job) -> tuple[int, float]:
        """What a job that is not yet here would wait for.

        Returns:
            Number of its caller's jobs that would get a slot before it, or have one; number of
            slots that are its caller's fair share now.
        """
        with self._lock:
            line = self._lines.get(job.account) or Line(job.terms)
            others = [each for each in self._lines.values() if each is not line]
            weights = line.terms.weight + sum(each.terms.weight for each in others)
            used = sum(each.slots for each in others)
            # Slots that others do not use are free for it.
            share = max(self.slots * line.terms.weight / weights, self.slots - used)
            if line.terms.running is not None:
                share = min(share, line.terms.running)
            return line.slots + line.ahead(due(job, self._clock())), max(share, 1.0)

    def clear(self) -> list[Job]:
        """Take out all jobs, also those that had to leave."""
        with self._lock:
            jobs = [*self._jobs, *self._displaced]
            self._jobs, self._lines, self._displaced = {}, {}, []
        for job in jobs:
            job.slot = -1
        return jobs
