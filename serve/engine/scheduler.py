"""Maps jobs to slots: admission, chunked prefill, continuous batching, cancellation.

One thread calls `Scheduler.tick` in a loop. Each tick runs at most one chunk of prefill and one
step of all running sequences, which bounds the time between two tokens. The decoder chooses the
slot of a prompt and what it reuses there. The event loop handles text while the device computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.lookup import Memories
from gpt_dist.inference.prefix_cache import ALIGNMENT
from serve.engine.jobs import (
    Ended,
    Event,
    Failed,
    Finish,
    Job,
    Lost,
    Scored,
    Scoring,
    Sequence,
    Started,
    Token,
)
from serve.engine.queue import Queue
from serve.engine.versions import Versions

log = logging.getLogger("serve")

COPIES = 16
"""So many copied tokens count as one that is computed. Copying one is at least this much faster."""


def losses(jobs: Iterable[Job], message: str, stopped: bool = False) -> list[tuple[Job, Event]]:
    """The end of jobs that are not finished; those that have begun come first."""
    order = sorted(jobs, key=lambda job: job.slot < 0)
    return [(job, Lost(message, job.slot >= 0, stopped)) for job in order]


class Scheduler:
    """Shares a decoder's slots among jobs; `Queue` says whose turn it is.

    `submit` and `cancel` may be called from any thread; `tick` only from one.

    Args:
        decoder: used by this scheduler alone.
        max_queue: maximum number of waiting jobs, beyond those that have a slot.
        prefill_chunk: maximum number of prompt tokens between two steps.
        weights_version: name of the decoder's weights.
        shared_prefixes: reuse cached prefixes of any caller's prompts, not only of the same one's.
        clock: the time in seconds, for deadlines.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_queue: int = 256,
        prefill_chunk: int = 256,
        weights_version: str = "",
        shared_prefixes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.decoder, self.max_queue, self.prefill_chunk = decoder, max_queue, prefill_chunk
        if decoder.deterministic:
            self.prefill_chunk = max(ALIGNMENT, prefill_chunk // ALIGNMENT * ALIGNMENT)
        self.clock, self.shared_prefixes = clock, shared_prefixes
        self.jobs = Queue(decoder.max_slots + max_queue, clock)
        self.weights = Versions(decoder, weights_version)
        self.running: dict[int, Sequence] = {}
        """The sequences that take part in steps, by slot."""
        self._prefilling: Job | None = None
        self._memories = Memories()
        self._events: list[tuple[Job, Event]] = []
        """Those of the latest tick."""

    @property
    def busy(self) -> bool:
        """Whether a tick would do something."""
        return len(self.jobs) > 0 or self.weights.pending

    def submit(self, jobs: list[Sequence] | list[Scoring]) -> None:
        """Queue jobs, all or none.

        Raises:
            QueueFull: the queue has no room for all of them.
        """
        self.jobs.add(jobs)

    def cancel(self, jobs: list[Sequence] | list[Scoring]) -> None:
        """Drop jobs before the next step. Finished jobs are ignored."""
        for job in jobs:
            job.cancelled = True

    def tick(self) -> list[tuple[Job, Event]]:
        """Run at most one chunk of prefill and one step; returns the events in order."""
        events = self._events = []
        self.weights.apply()
        self._reap(events)
        self._prefill(events)
        if self.running:
            self._step(events)
        else:
            self.decoder.flush()
        return events

    def abandon(self, message: str) -> list[tuple[Job, Event]]:
        """Drop all jobs after a failed tick, without using the decoder.

        Returns:
            The events of that tick, then the end of each job; those that have begun come first.
        """
        self.running, self._prefilling = {}, None
        return [*self._events, *losses(self.jobs.clear(), message)]

    def _end(self, job: Job, events: list[tuple[Job, Event]], event: Event | None) -> None:
        """Release a job and its slot."""
        if job is self._prefilling:
            self._prefilling = None
        if job.slot >= 0:
            self._remember(job)
            self.running.pop(job.slot, None)
            self.decoder.free(job.slot)
        self.jobs.remove(job)
        job.slot = -1
        if event is not None:
            events.append((job, event))

    def _reap(self, events: list[tuple[Job, Event]]) -> None:
        """Release jobs that were cancelled or whose time is over."""
        now = self.clock()
        for job in self.jobs.all():
            event = job.overdue(now)
            if job.cancelled or event is not None:
                self._end(job, events, None if job.cancelled else event)

    def _prefill(self, events: list[tuple[Job, Event]]) -> None:
        """Compute at most one chunk of prompts and texts."""
        budget = self.prefill_chunk
        while budget > 0:
            if self._prefilling is None:
                budget -= self._admit(budget, events)
            job = self._prefilling
            if job is None:
                return
            # A sequence's last token is run by its first step, together with the other sequences.
            left = len(job.ids) - 1 - job.done
            count = min(budget, left)
            if self.decoder.deterministic and count < left:
                count -= count % ALIGNMENT
            if count == 0 < left:
                return
            budget -= max(count, 1)
            try:
                self._compute(job, count, events)
            except RuntimeError:  # a device error: its state is unknown
                raise
            except Exception:
                log.exception("a request failed")
                self.decoder.free(job.slot)
                self.decoder.prefill(job.slot, [])  # drop the partly written cache
                self._end(job, events, Failed())

    def _compute(self, job: Job, count: int, events: list[tuple[Job, Event]]) -> None:
        """Compute the next ``count`` tokens of a prompt or text, and start what is complete."""
        chunk = job.ids[job.done : job.done + count + 1]
        if isinstance(job, Sequence):
            self.decoder.prefill(job.slot, chunk[:-1], job.done)
        elif isinstance(job, Scoring) and count:
            job.parts.append(self.decoder.score(job.slot, chunk, job.done, job.top))
        job.done += count
        self.jobs.charge(job, count)
        if job.done < len(job.ids) - 1:
            return
        self._prefilling = None
        if isinstance(job, Sequence):
            memory = self._memories.of(job.owner)
            self.decoder.activate(job.slot, job.sampling, job.ids, memory)
            self.running[job.slot] = job
        elif isinstance(job, Scoring):
            self._end(job, events, Scored(job.parts, self.weights.of(job.slot)))

    def _admit(self, budget: int, events: list[tuple[Job, Event]]) -> int:
        """Give the next job a slot if the budget pays for the copies; returns what they cost."""
        job = self.jobs.next() if self.decoder.free_slots else None
        if job is None:
            return 0
        # All tokens of a text are computed, because each has to be scored.
        prompt = job.ids[: -1 if isinstance(job, Sequence) else 0]
        owner = job.salt if self.shared_prefixes else job.owner
        try:
            place = self.decoder.place(prompt, COPIES * self.prefill_chunk, owner)
        except Exception:
            log.exception("a request failed")
            self._end(job, events, Failed())
            return 0
        if place is None or place.copied > COPIES * budget:
            return 0
        # Before admit: if that fails, this job may be why.
        job.slot, job.done = place.slot, place.length
        self.decoder.admit(place, owner)
        self._prefilling = job
        if isinstance(job, Sequence):
            events.append((job, Started(self.clock(), place.length, self.weights.of(job.slot))))
        return -(-place.copied // COPIES)

    def _remember(self, job: Job) -> None:
        """Keep a sequence's output for the guesses of its caller's later ones."""
        if isinstance(job, Sequence) and (memory := self._memories.of(job.owner)):
            memory.add(self.decoder.tokens(job.slot, len(job.ids)))

    def _step(self, events: list[tuple[Job, Event]]) -> None:
        """Generate one token for each running sequence, and release finished ones."""
        result = self.decoder.step()
        now = self.clock()
        for slot, count in result.drafted.items():
            self.running[slot].drafted += count
        rows = zip(
            result.slots, result.tokens, result.logprobs, result.top, result.last, strict=True
        )
        for slot, token, logprob, top, last in rows:
            job = self.running.get(slot)
            if job is None:  # an earlier token of this step ended it
                continue
            if token in job.sampling.stop_ids:
                reason = Finish.EOS if token == job.eos_id else Finish.STOP_TOKEN
                self._end(job, events, Ended(now, reason, token))
                continue
            events.append((job, Token(now, token, logprob, top)))
            self.jobs.charge(job, 1)
            job.generated += 1
            job.accepted += not last
            if job.generated >= job.max_new_tokens:
                self._end(job, events, Ended(now, Finish.LENGTH))
            elif last and not self.decoder.room(slot):
                self._end(job, events, Ended(now, Finish.CONTEXT_FULL))
