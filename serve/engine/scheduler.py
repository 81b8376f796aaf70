"""Maps requests to slots: admission, chunked prefill, continuous batching, cancellation, prefixes.

One thread calls `Scheduler.tick` in a loop. Each tick runs at most one chunk of prefill and one
step of all running sequences, which bounds the time between two tokens. The scheduler handles token
ids only; the event loop handles text while the device computes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from gpt_dist.inference.decoder import Decoder, Scores, Weights
from serve.engine.jobs import (
    Ended,
    Event,
    Expired,
    Finish,
    Job,
    Lost,
    QueueFull,
    Scored,
    Scoring,
    Sequence,
    Started,
    Token,
)

MIN_REUSE = 16
"""A shorter common prefix is computed again: reusing it would not pay."""
ALIGNMENT = 128
"""Deterministic prefill runs chunks of this many tokens, counted from the start of the prompt."""


@dataclass
class _Scoring:
    """A text being scored."""

    job: Scoring
    parts: Generator[Scores, None, None]
    version: str
    found: list[Scores] = field(default_factory=list)


class Scheduler:
    """Shares a decoder's slots among requests.

    `submit`, `cancel` and `swap` may be called from any thread; `tick` only from one.

    Args:
        decoder: used by this scheduler alone.
        max_queue: maximum number of waiting jobs, beyond those that have a slot.
        prefill_chunk: maximum number of prompt tokens between two steps.
        weights_version: name of the decoder's weights.
        clock: the time in seconds, for deadlines.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_queue: int = 256,
        prefill_chunk: int = 256,
        weights_version: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.decoder, self.max_queue, self.prefill_chunk = decoder, max_queue, prefill_chunk
        if decoder.deterministic:
            self.prefill_chunk = max(ALIGNMENT, prefill_chunk // ALIGNMENT * ALIGNMENT)
        self.clock = clock
        self.running: dict[int, Sequence] = {}
        """The sequences that take part in steps, by slot."""
        self._lock = threading.Lock()
        self._waiting: deque[Sequence] = deque()
        self._texts: deque[Scoring] = deque()
        self._jobs: set[Job] = set()
        self._prefilling: Sequence | None = None
        self._scoring: _Scoring | None = None
        self._score_next = False
        self._pending: tuple[Weights, str] | None = None
        self._names = {decoder.weights.version: weights_version}
        # The tokens in each slot's cache, and when the slot was last used.
        self._cached = np.zeros((decoder.max_slots, decoder.max_context + 1), np.int64)
        self._prompt_length = np.zeros(decoder.max_slots, np.int64)
        self._used = np.zeros(decoder.max_slots, np.int64)
        self._clock_hand = itertools.count(1)
        self._released, self._interval = clock(), 1.0

    # --- from any thread ------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Maximum number of jobs in the scheduler."""
        return self.decoder.max_slots + self.max_queue

    @property
    def load(self) -> int:
        """Number of jobs in the scheduler."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Number of jobs that have not started."""
        return len(self._waiting) + len(self._texts)

    @property
    def weights_version(self) -> str:
        """Name of the weights for new sequences."""
        return self._pending[1] if self._pending else self._names[self.decoder.weights.version]

    @property
    def busy(self) -> bool:
        """Whether a tick would do something."""
        return bool(self._jobs) or self._pending is not None

    @property
    def retry_after(self) -> float:
        """Estimated seconds until a job ends, from recent ones."""
        return min(max(self._interval, 0.1), 10.0)

    def submit(self, jobs: list[Sequence] | list[Scoring]) -> None:
        """Queue jobs, all or none.

        Raises:
            QueueFull: the queue has no room for all of them.
        """
        with self._lock:
            if len(self._jobs) + len(jobs) > self.capacity:
                raise QueueFull
            self._jobs.update(jobs)
            for job in jobs:
                if isinstance(job, Sequence):
                    self._waiting.append(job)
                else:
                    self._texts.append(job)

    def cancel(self, jobs: list[Sequence] | list[Scoring]) -> None:
        """Drop jobs before the next step. Finished jobs are ignored."""
        for job in jobs:
            job.cancelled = True

    def swap(self, weights: Weights, version: str) -> None:
        """Use other weights for sequences that start at the next tick or later."""
        self._pending = weights, version

    # --- from the engine's thread -----------------------------------------------------------------

    def tick(self) -> list[tuple[Job, Event]]:
        """Run at most one chunk of prefill or scoring and one step; returns the events in order."""
        events: list[tuple[Job, Event]] = []
        if self._pending is not None:
            (weights, version), self._pending = self._pending, None
            self._names[weights.version] = version
            self.decoder.use(weights)
        self._reap(events)
        if (self._scoring or self._texts) and (self._score_next or not self._can_prefill()):
            self._score_next = False
            self._score(events)
        else:
            self._score_next = True
            self._prefill(events)
        if self.running:
            self._step(events)
        return events

    def abandon(self, message: str) -> list[tuple[Job, Event]]:
        """Drop all jobs without using the decoder."""
        with self._lock:
            jobs, self._jobs = self._jobs, set()
            self.running, self._prefilling, self._scoring = {}, None, None
            self._waiting.clear()
            self._texts.clear()
        return [(job, Lost(message)) for job in jobs]

    def _can_prefill(self) -> bool:
        return self._prefilling is not None or (
            bool(self._waiting) and len(self.running) < self.decoder.max_slots
        )

    def _release(self, job: Job) -> None:
        if isinstance(job, Sequence) and job.slot >= 0:
            self.running.pop(job.slot, None)
            self.decoder.free(job.slot)
            self._used[job.slot] = next(self._clock_hand)
            job.slot = -1
        now = self.clock()
        self._interval += 0.1 * (min(now - self._released, 10.0) - self._interval)
        self._released = now
        with self._lock:
            self._jobs.discard(job)

    def _end(self, job: Sequence, events: list[tuple[Job, Event]], ended: Ended) -> None:
        self._release(job)
        events.append((job, ended))

    def _reap(self, events: list[tuple[Job, Event]]) -> None:
        """Release jobs that were cancelled or whose time is over."""
        now = self.clock()
        for sequence in list(self.running.values()):
            self._overdue(sequence, now, events)
        if self._prefilling is not None and self._overdue(self._prefilling, now, events):
            self._prefilling = None
        if self._scoring is not None and self._overdue(self._scoring.job, now, events):
            self._scoring.parts.close()
            self._scoring = None
        with self._lock:
            waiting, texts = list(self._waiting), list(self._texts)
        gone: set[Job] = {job for job in (*waiting, *texts) if self._overdue(job, now, events)}
        if gone:
            with self._lock:
                self._waiting = deque(job for job in self._waiting if job not in gone)
                self._texts = deque(job for job in self._texts if job not in gone)

    def _overdue(self, job: Job, now: float, events: list[tuple[Job, Event]]) -> bool:
        if job.cancelled:
            self._release(job)
        elif job.deadline is not None and now >= job.deadline:
            self._release(job)
            events.append((job, Expired()))
        elif isinstance(job, Sequence) and job.expires_at is not None and now >= job.expires_at:
            self._end(job, events, Ended(now, Finish.TIME_BUDGET))
        else:
            return False
        return True

    def _prefill(self, events: list[tuple[Job, Event]]) -> None:
        budget = self.prefill_chunk
        while budget > 0:
            sequence = self._prefilling or self._begin(events)
            if sequence is None:
                return
            self._prefilling = sequence
            # The first step runs the last token, together with the other sequences.
            left = len(sequence.ids) - 1 - sequence.done
            count = min(budget, left)
            if self.decoder.deterministic and count < left:
                count -= count % ALIGNMENT
                if count == 0:
                    return
            end = sequence.done + count
            self.decoder.prefill(sequence.slot, sequence.ids[sequence.done : end], sequence.done)
            self._cached[sequence.slot, sequence.done : end] = sequence.ids[sequence.done : end]
            sequence.done = end
            budget -= max(count, 1)
            if count == left:
                self.decoder.activate(sequence.slot, sequence.sampling, sequence.ids)
                self._cached[sequence.slot, end] = sequence.ids[end]
                self._prompt_length[sequence.slot] = end
                self.running[sequence.slot] = sequence
                self._prefilling = None

    def _begin(self, events: list[tuple[Job, Event]]) -> Sequence | None:
        """Move the next sequence into a slot, and reuse a cached prefix of its prompt."""
        free = [slot for slot in range(self.decoder.max_slots) if slot not in self.running]
        with self._lock:
            if not (self._waiting and free):
                return None
            sequence = self._waiting.popleft()
        prompt, decoder = sequence.ids[:-1], self.decoder
        source, length = self._longest_prefix(prompt)
        # Prefer low slots: a step computes all slots up to the highest one in use.
        slot = source if source in free and source == free[0] else free[0]
        if slot != source:
            self._spare(slot, free[1:], source)
        if length and source != slot:
            decoder.copy_prefix(source, slot, length)
            self._cached[slot, :length] = prompt[:length]
        sequence.slot, sequence.done = slot, length
        if not length:
            decoder.prefill(slot, prompt[:0])  # binds the newest weights
        self._prompt_length[slot] = length
        version = self._names[decoder.version(slot) or decoder.weights.version]
        events.append((sequence, Started(self.clock(), length, version)))
        return sequence

    def _longest_prefix(self, prompt: np.ndarray) -> tuple[int, int]:
        """Find the longest cached prefix of a prompt, under the newest weights.

        Returns:
            Slot and length in tokens, or (-1, 0).
        """
        decoder = self.decoder
        valid = np.array(
            [
                decoder.length(slot) if decoder.version(slot) == decoder.weights.version else 0
                for slot in range(decoder.max_slots)
            ]
        )
        if decoder.deterministic:  # a step adds in another order than prefill
            valid = np.minimum(valid, self._prompt_length)
        width = min(len(prompt), int(valid.max()))
        if width < MIN_REUSE:
            return -1, 0
        same = self._cached[:, :width] == prompt[:width]
        lengths = np.minimum(same.cumprod(1).sum(1), valid)
        if decoder.deterministic:
            lengths = np.where(lengths < len(prompt), lengths // ALIGNMENT * ALIGNMENT, lengths)
        source = int(lengths.argmax())
        length = int(lengths[source])
        return (source, length) if length >= MIN_REUSE else (-1, 0)

    def _spare(self, slot: int, others: list[int], source: int) -> None:
        """Move a slot's cached prefix to the least recently used free slot."""
        length, decoder = self.decoder.length(slot), self.decoder
        others = [other for other in others if other != source]
        if length < MIN_REUSE or not others:
            return
        target = min(others, key=lambda other: (decoder.length(other) > 0, self._used[other]))
        if decoder.length(target) == 0 or self._used[target] < self._used[slot]:
            decoder.copy_prefix(slot, target, length)
            decoder.free(target)
            self._cached[target] = self._cached[slot]
            self._prompt_length[target] = self._prompt_length[slot]
            self._used[target] = self._used[slot]

    def _score(self, events: list[tuple[Job, Event]]) -> None:
        """Score one chunk of a text."""
        if self._scoring is None:
            with self._lock:
                job = self._texts.popleft()
            parts = self.decoder.score(job.ids, job.top, self.prefill_chunk)
            version = self._names[self.decoder.weights.version]
            self._scoring = _Scoring(job, cast("Generator[Scores, None, None]", parts), version)
        current = self._scoring
        if (part := next(current.parts, None)) is not None:
            current.found.append(part)
            if part.start + len(part.logprobs) < len(current.job.ids):
                return
        current.parts.close()
        self._scoring = None
        self._release(current.job)
        events.append((current.job, Scored(current.found, current.version)))

    def _step(self, events: list[tuple[Job, Event]]) -> None:
        """Generate one token for each running sequence, and release finished ones."""
        result = self.decoder.step()
        now = self.clock()
        rows = zip(result.slots, result.tokens, result.logprobs, result.top, strict=True)
        for slot, token, logprob, top in rows:
            sequence = self.running[slot]
            if token in sequence.sampling.stop_ids:
                eos = token == sequence.eos_id
                self._end(
                    sequence, events, Ended(now, Finish.EOS if eos else Finish.STOP_TOKEN, token)
                )
                continue
            events.append((sequence, Token(now, token, logprob, top)))
            sequence.generated += 1
            self._cached[slot, self.decoder.length(slot)] = token
            if sequence.generated >= sequence.max_new_tokens:
                self._end(sequence, events, Ended(now, Finish.LENGTH))
            elif not self.decoder.room(slot):
                self._end(sequence, events, Ended(now, Finish.CONTEXT_FULL))
