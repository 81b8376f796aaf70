"""Which job has which of a decoder's slots, and what its caller is told about it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.lookup import Memories
from gpt_dist.inference.prefix_cache import Place
from gpt_dist.inference.results import Weights
from serve.engine.estimates import Estimates
from serve.engine.jobs import Event, Failed, Job, Sequence, Started
from serve.engine.queue import Queue
from serve.engine.versions import Versions

log = logging.getLogger("serve")


class Slots:
    """Gives a decoder's slots to jobs and takes them back.

    Args:
        decoder: computes in the slots.
        jobs: says whose turn it is.
        weights: names the decoder's weights.
        estimates: learns how long a job keeps its slot.
        clock: the time in seconds.
    """

    def __init__(
        self,
        decoder: Decoder,
        jobs: Queue,
        weights: Versions,
        estimates: Estimates,
        clock: Callable[[], float],
    ) -> None:
        self.decoder, self.jobs, self.weights = decoder, jobs, weights
        self.estimates, self.clock = estimates, clock
        self.running: dict[int, Sequence] = {}
        """The sequences that take part in steps, by slot."""
        self.preempted = 0
        """How many times a sequence has lost its slot."""
        self.events: list[tuple[Job, Event]] = []
        """What callers have not been told yet, in order."""
        self._memories = Memories()

    def next(self) -> Job | None:
        """The job that gets a slot now; None if there is none, or no slot for it."""
        job = self.jobs.next()
        return job if job is not None and (self.decoder.free_slots or self._preempt()) else None

    def give(self, job: Job, place: Place, owner: str, weights: Weights | None) -> None:
        """Give a job the slot that the decoder chose, with the prefix that is cached for it."""
        again = job.began
        # Before admit: if that fails, this job may be why.
        self.jobs.start(job, place.slot)
        job.done, job.since = place.length, self.clock()
        self.decoder.admit(place, owner, weights)
        if isinstance(job, Sequence) and not again:
            started = Started(self.clock(), place.length, self.weights.of(job.slot))
            self.events.append((job, started))

    def run(self, job: Sequence) -> None:
        """Let a sequence take part in steps: its prompt is computed."""
        generated = len(job.input) - len(job.ids)
        memory = self._memories.of(job.owner)
        self.decoder.activate(job.slot, job.sampling, job.input, memory, generated)
        self.running[job.slot] = job

    def end(self, job: Job, event: Event | None) -> None:
        """Release a job and its slot, if it has one. Its caller is told ``event``."""
        if job.slot >= 0:
            self._remember(job)
            self.running.pop(job.slot, None)
            self.decoder.free(job.slot)
            if not job.cancelled:
                self.estimates.ended(self.clock() - job.since)
        if isinstance(job, Sequence):
            self.weights.release(job.weights)
        self.jobs.remove(job)
        if event is not None:
            self.events.append((job, event))

    def fail(self, job: Job) -> None:
        """End a job while its error is handled, which is logged."""
        log.exception("a request failed")
        if job.slot >= 0:
            self.decoder.free(job.slot)
            self.decoder.prefill(job.slot, [])  # drop the partly written cache
        self.end(job, Failed())

    def take_events(self) -> list[tuple[Job, Event]]:
        """The events since the last call, in order."""
        events, self.events = self.events, []
        return events

    def _preempt(self) -> bool:
        """Free a slot for the next job, if its caller has fewer than another; returns whether.

        The sequence that loses it goes on later. Its tokens are computed like a prompt then. In
        deterministic mode they are generated once more, because a step adds in another order.
        """
        job = self.jobs.victim(self.running.values())
        if job is None:
            return False
        self.weights.release(job.weights)
        job.weights = self.decoder.weights_of(job.slot)
        self.weights.hold(job.weights)
        if self.decoder.deterministic:
            job.repeated = job.generated
        else:
            job.kept = np.array(self.decoder.tokens(job.slot))
        del self.running[job.slot]
        self.decoder.free(job.slot)
        self.jobs.put_back(job)
        self.preempted += 1
        return True

    def _remember(self, job: Job) -> None:
        """Keep a sequence's output for the guesses of its caller's later ones."""
        if isinstance(job, Sequence) and (memory := self._memories.of(job.owner)):
            memory.add(self.decoder.tokens(job.slot, len(job.ids)))
