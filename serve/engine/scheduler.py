"""Maps jobs to slots: chunked prefill, continuous batching, cancellation, deadlines.

One thread calls `Scheduler.tick` in a loop. Each tick runs at most one chunk of prefill and one
step of all running sequences, which bounds the time between two tokens. The decoder chooses the
slot of a prompt and what it reuses there. The event loop handles text while the device computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from gpt_dist.inference.decoder import Decoder
from serve.engine.estimates import Estimates
from serve.engine.jobs import (
    Displaced,
    Ended,
    Event,
    Finish,
    Job,
    Lost,
    Scoring,
    Sequence,
    Token,
)
from serve.engine.prefill import Prefill
from serve.engine.queue import Queue
from serve.engine.refusals import TooLate
from serve.engine.slots import Slots
from serve.engine.versions import Versions


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
        self.decoder, self.max_queue, self.clock = decoder, max_queue, clock
        self.jobs = Queue(decoder.max_slots + max_queue, clock, decoder.max_slots)
        self.estimates = Estimates()
        self.weights = Versions(decoder, weights_version)
        self.slots = Slots(decoder, self.jobs, self.weights, self.estimates, clock)
        self.prefill = Prefill(self.slots, prefill_chunk, shared_prefixes)

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
        began = self.clock()
        self.weights.apply()
        self._reap()
        prefilled, tokens = self.prefill.run(), 0.0
        if running := len(self.slots.running):
            tokens = self._step() / running
        else:
            self.decoder.flush()
        self.estimates.ticked(self.clock() - began, prefilled, tokens)
        return self.slots.take_events()

    def abandon(self, message: str) -> list[tuple[Job, Event]]:
        """Drop all jobs after a failed tick, without using the decoder.

        Returns:
            The events of that tick, then the end of each job; those that have begun come first.
        """
        self.slots.running.clear()
        return [*self.slots.take_events(), *losses(self.jobs.clear(), message)]

    def _reap(self) -> None:
        """Release jobs that were cancelled or whose time is over."""
        now = self.clock()
        events = self.slots.events
        events += [(job, Displaced()) for job in self.jobs.displaced() if not job.cancelled]
        for job in self.jobs.all():
            event = job.overdue(now)
            if job.cancelled or event is not None:
                self.slots.end(job, None if job.cancelled else event)

    def _step(self) -> int:
        """Generate one token for each running sequence, and release finished ones.

        Returns:
            How many tokens were generated.
        """
        result = self.decoder.step()
        now, slots = self.clock(), self.slots
        for slot, count in result.drafted.items():
            # Guesses at tokens that the caller has already are not counted, as those are not.
            slots.running[slot].drafted += max(0, count - slots.running[slot].repeated)
        rows = zip(
            result.slots, result.tokens, result.logprobs, result.top, result.last, strict=True
        )
        for slot, token, logprob, top, last in rows:
            job = slots.running.get(slot)
            if job is None:  # an earlier token of this step ended it
                continue
            if job.repeated:  # its caller has this token already
                job.repeated -= 1
                continue
            if token in job.sampling.stop_ids:
                reason = Finish.EOS if token == job.eos_id else Finish.STOP_TOKEN
                slots.end(job, Ended(now, reason, token))
                continue
            slots.events.append((job, Token(now, token, logprob, top)))
            self.jobs.charge(job, 1)
            job.generated += 1
            job.accepted += not last
            if job.generated >= job.max_new_tokens:
                slots.end(job, Ended(now, Finish.LENGTH))
            elif last and not self.decoder.room(slot):
                slots.end(job, Ended(now, Finish.CONTEXT_FULL))
        return len(result.tokens)
