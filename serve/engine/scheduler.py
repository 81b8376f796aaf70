"""Maps jobs to slots: admission, chunked prefill, continuous batching, cancellation.

One thread calls `Scheduler.tick` in a loop. Each tick runs at most one chunk of prefill and one
step of all running sequences, which bounds the time between two tokens. The decoder chooses the
slot of a prompt and what it reuses there. The event loop handles text while the device computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import numpy as np

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.lookup import Memories
from gpt_dist.inference.prefix_cache import ALIGNMENT
from serve.engine.estimates import Estimates
from serve.engine.jobs import (
    Displaced,
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
from serve.engine.refusals import TooLate
from serve.engine.versions import Versions

log = logging.getLogger("serve")

COPIES = 16
"""So many copied tokens count as one that is computed. Copying one is at least this much faster."""


def losses(jobs: Iterable[Job], message: str, stopped: bool = False) -> list[tuple[Job, Event]]:
    """The end of jobs that are not finished; those that have begun come first."""
    order = sorted(jobs, key=lambda job: not job.began)
    return [(job, Lost(message, job.began, stopped)) for job in order]


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
        self.jobs = Queue(decoder.max_slots + max_queue, clock, decoder.max_slots)
        self.estimates = Estimates()
        self.preempted = 0
        """How many times a sequence has lost its slot."""
        self._prefilled = 0
        """Tokens of prompts that this tick has computed."""
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
            CallerFull: a limit of their caller is reached.
            QueueFull: the queue has no room for all of them.
            TooLate: they could not end before their deadline.
        """
        self._check_deadline(jobs[0])
        self.jobs.add(jobs)

    def _check_deadline(self, job: Job) -> None:
        """Refuse what cannot end in time, so that it takes no slot for nothing."""
        if job.deadline is None or (job.ends_at is not None and job.ends_at <= job.deadline):
            return
        seconds = self.estimates.least_seconds(job, *self.jobs.ahead(job))
        if self.clock() + seconds > job.deadline:
            raise TooLate(seconds)

    def cancel(self, jobs: list[Sequence] | list[Scoring]) -> None:
        """Drop jobs before the next step. Finished jobs are ignored."""
        for job in jobs:
            job.cancelled = True

    def tick(self) -> list[tuple[Job, Event]]:
        """Run at most one chunk of prefill and one step; returns the events in order."""
        events = self._events = []
        self._prefilled, began = 0, self.clock()
        self.weights.apply()
        self._reap(events)
        self._prefill(events)
        running = len(self.running)
        tokens = 0
        if running:
            tokens = self._step(events)
        else:
            self.decoder.flush()
        self.estimates.ticked(self.clock() - began, self._prefilled, tokens / max(running, 1))
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
            if not job.cancelled:
                self.estimates.ended(self.clock() - job.since)
        if isinstance(job, Sequence):
            self.weights.release(job.weights)
        self.jobs.remove(job)
        if event is not None:
            events.append((job, event))

    def _reap(self, events: list[tuple[Job, Event]]) -> None:
        """Release jobs that were cancelled or whose time is over."""
        now = self.clock()
        events += [(job, Displaced()) for job in self.jobs.displaced() if not job.cancelled]
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
            left = len(job.input) - 1 - job.done
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
        chunk = job.input[job.done : job.done + count + 1]
        if isinstance(job, Sequence):
            self.decoder.prefill(job.slot, chunk[:-1], job.done)
        elif isinstance(job, Scoring) and count:
            job.parts.append(self.decoder.score(job.slot, chunk, job.done, job.top))
        job.done += count
        self._prefilled += count
        if not job.resumed:
            self.jobs.charge(job, count)
        if job.done < len(job.input) - 1:
            return
        self._prefilling = None
        if isinstance(job, Sequence):
            memory = self._memories.of(job.owner)
            generated = len(job.input) - len(job.ids)
            self.decoder.activate(job.slot, job.sampling, job.input, memory, generated)
            self.running[job.slot] = job
        elif isinstance(job, Scoring):
            self._end(job, events, Scored(job.parts, self.weights.of(job.slot)))

    def _admit(self, budget: int, events: list[tuple[Job, Event]]) -> int:
        """Give the next job a slot if the budget pays for the copies; returns what they cost."""
        job = self.jobs.next()
        if job is None or not (self.decoder.free_slots or self._preempt()):
            return 0
        # All tokens of a text are computed, because each has to be scored.
        prompt = job.input[: -1 if isinstance(job, Sequence) else 0]
        weights = job.weights if isinstance(job, Sequence) else None
        owner = job.salt if self.shared_prefixes else job.owner
        try:
            place = self.decoder.place(prompt, COPIES * self.prefill_chunk, owner, weights)
        except Exception:
            log.exception("a request failed")
            self._end(job, events, Failed())
            return 0
        if place is None or place.copied > COPIES * budget:
            return 0
        # Before admit: if that fails, this job may be why.
        again = job.began
        self.jobs.start(job, place.slot)
        job.done, job.since = place.length, self.clock()
        self.decoder.admit(place, owner, weights)
        self._prefilling = job
        self.estimates.admitted(len(prompt), place.length)
        if isinstance(job, Sequence) and not again:
            events.append((job, Started(self.clock(), place.length, self.weights.of(job.slot))))
        return -(-place.copied // COPIES)

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

    def _step(self, events: list[tuple[Job, Event]]) -> int:
        """Generate one token for each running sequence, and release finished ones.

        Returns:
            How many tokens were generated.
        """
        result = self.decoder.step()
        now = self.clock()
        for slot, count in result.drafted.items():
            # Guesses at tokens that the caller has already are not counted, as those are not.
            self.running[slot].drafted += max(0, count - self.running[slot].repeated)
        rows = zip(
            result.slots, result.tokens, result.logprobs, result.top, result.last, strict=True
        )
        for slot, token, logprob, top, last in rows:
            job = self.running.get(slot)
            if job is None:  # an earlier token of this step ended it
                continue
            if job.repeated:  # its caller has this token already
                job.repeated -= 1
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
        return len(result.tokens)
