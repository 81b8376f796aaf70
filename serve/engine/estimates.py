"""How long work takes, from what was measured."""

from __future__ import annotations

from serve.engine.jobs import Job, Sequence

CAUTION = 0.5
"""A job is refused if even this part of the estimate is too long: estimates can be wrong."""
FADE = 0.1
"""Weight of a new measurement."""


class Estimates:
    """Mean times of recent work, in seconds; 0 as long as nothing was measured."""

    def __init__(self) -> None:
        self.step = 0.0
        """From a sequence's token to its next one."""
        self.prompt_token = 0.0
        """To compute a token of a prompt."""
        self.fresh = 1.0
        """Part of the prompts that is computed, and not in the cache."""
        self.turn = 0.0
        """From getting a slot to the end of the job."""

    def ticked(self, seconds: float, prefilled: int, generated: float) -> None:
        """Note a tick.

        Args:
            seconds: how long it took.
            prefilled: tokens of prompts that were computed.
            generated: new tokens of each running sequence, on average.
        """
        if not prefilled and generated:
            self.step = _mean(self.step, seconds / generated)
        elif prefilled:
            step = self.step if generated else 0.0
            self.prompt_token = _mean(self.prompt_token, max(0.0, seconds - step) / prefilled)

    def admitted(self, tokens: int, cached: int) -> None:
        """Note that a prompt got a slot, and how many of its tokens were in the cache."""
        self.fresh = _mean(self.fresh, 1 - cached / max(tokens, 1))

    def ended(self, seconds: float) -> None:
        """Note how long a job had its slot."""
        self.turn = _mean(self.turn, seconds)

    def least_seconds(self, job: Job, ahead: int, slots: float) -> float:
        """A time in which a new job cannot be answered, as far as one can tell.

        Args:
            job: what is to be computed.
            ahead: how many jobs of the same caller come first.
            slots: how many slots the caller has at once.
        """
        tokens = job.least_new_tokens if isinstance(job, Sequence) else 0
        turns = max(0.0, ahead + 1 - slots) / slots
        work = len(job.ids) * self.fresh * self.prompt_token + tokens * self.step
        return CAUTION * (turns * self.turn + work)


def _mean(old: float, new: float) -> float:
    return old + FADE * (new - old) if old else new
