"""Admission and chunked prefill: how a job comes to a slot, and its prompt into the cache."""

from __future__ import annotations

from gpt_dist.inference.prefix_cache import ALIGNMENT
from serve.engine.jobs import Job, Scored, Scoring, Sequence
from serve.engine.slots import Slots

COPIES = 16
"""So many copied tokens count as one that is computed. Copying one is at least this much faster."""


class Prefill:
    """Computes prompts and texts, one job after another, at most a chunk of tokens in each tick.

    Args:
        slots: where they are computed.
        chunk: maximum number of tokens, in deterministic mode rounded to whole blocks.
        shared_prefixes: reuse cached prefixes of any caller's prompts, not only of the same one's.
    """

    def __init__(self, slots: Slots, chunk: int, shared_prefixes: bool) -> None:
        self._slots, self._shared_prefixes = slots, shared_prefixes
        self._decoder = slots.decoder
        if self._decoder.deterministic:
            chunk = max(ALIGNMENT, chunk // ALIGNMENT * ALIGNMENT)
        self.chunk = chunk
        self._job: Job | None = None
        """The one that is computed now."""

    def run(self) -> int:
        """Compute at most one chunk; returns the number of tokens."""
        budget, computed = self.chunk, 0
        while budget > 0:
            if self._job is None or self._job.slot < 0:  # none, or it has ended
                self._job, cost = self._admit(budget)
                budget -= cost
            job = self._job
            if job is None:
                break
            # A sequence's last token is run by its first step, together with the other sequences.
            left = len(job.input) - 1 - job.done
            count = min(budget, left)
            if self._decoder.deterministic and count < left:
                count -= count % ALIGNMENT
            if count == 0 < left:
                break
            budget -= max(count, 1)
            try:
                self._compute(job, count)
            except RuntimeError:  # a device error: its state is unknown
                raise
            except Exception:
                self._slots.fail(job)
            else:
                computed += count
        return computed

    def _admit(self, budget: int) -> tuple[Job | None, int]:
        """Give the next job a slot if the budget pays for the copies; the job and their cost."""
        job = self._slots.next()
        if job is None:
            return None, 0
        # All tokens of a text are computed, because each has to be scored.
        prompt = job.input[: -1 if isinstance(job, Sequence) else 0]
        weights = job.weights if isinstance(job, Sequence) else None
        owner = job.salt if self._shared_prefixes else job.owner
        try:
            place = self._decoder.place(prompt, COPIES * self.chunk, owner, weights)
        except Exception:
            self._slots.fail(job)
            return None, 0
        if place is None or place.copied > COPIES * budget:
            return None, 0
        self._slots.give(job, place, owner, weights)
        self._slots.estimates.admitted(len(prompt), place.length)
        return job, -(-place.copied // COPIES)

    def _compute(self, job: Job, count: int) -> None:
        """Compute the next ``count`` tokens of a prompt or text, and start what is complete."""
        slots = self._slots
        chunk = job.input[job.done : job.done + count + 1]
        if isinstance(job, Sequence):
            self._decoder.prefill(job.slot, chunk[:-1], job.done)
        elif isinstance(job, Scoring) and count:
            job.parts.append(self._decoder.score(job.slot, chunk, job.done, job.top))
        job.done += count
        if not job.resumed:
            slots.jobs.charge(job, count)
        if job.done < len(job.input) - 1:
            return
        self._job = None
        if isinstance(job, Sequence):
            slots.run(job)
        elif isinstance(job, Scoring):
            slots.end(job, Scored(job.parts, slots.weights.of(job.slot)))
