"""Jobs, which go into the scheduler, and events, which come out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np

from gpt_dist.inference.results import Scores, Weights
from gpt_dist.inference.sampling import SamplingParams
from serve.engine.callers import Terms


class Finish(IntEnum):
    """Why a sequence ended. The values are those of ``gpt_dist.v1.FinishReason``."""

    LENGTH = 1
    EOS = 2
    STOP_SEQUENCE = 3
    STOP_TOKEN = 4
    CONTEXT_FULL = 5
    TIME_BUDGET = 6


@dataclass(frozen=True, slots=True)
class Started:
    """The computation of the prompt begins."""

    at: float
    cached_tokens: int
    weights_version: str


@dataclass(frozen=True, slots=True)
class Token:
    """A new token, its log-probability, and the most likely (id, log-probability) at its place."""

    at: float
    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a sequence. ``token`` is the stop token, which is not part of it."""

    at: float
    reason: Finish
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """All log-probabilities of a text."""

    parts: list[Scores]
    weights_version: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The caller's deadline passed."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine failed or stopped, and the job with it."""

    message: str
    began: bool
    """Whether its computation had begun. If not, it cannot have caused the failure and is safe to
    repeat elsewhere."""
    stopped: bool = False
    """Whether the engine was stopped, and did not fail."""


@dataclass(frozen=True, slots=True)
class Displaced:
    """The queue was full, and the job of a caller with fewer jobs came. It had not begun."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The job raised an error of its own, which is logged. Other jobs are not affected."""


Event = Started | Token | Ended | Scored | Expired | Displaced | Lost | Failed


class Listener(Protocol):
    """Receives the events of a job, in the event loop's thread."""

    def __call__(self, event: Event) -> None: ...


@dataclass(eq=False)
class Job:
    """Anything that can be submitted to the scheduler.

    ``deadline`` and ``expires_at`` are in seconds of the scheduler's clock.
    """

    ids: np.ndarray
    """(T,) int64 prompt or text."""
    listener: Listener
    deadline: float | None = None
    caller: str = ""
    """Whose it is. Cached prefixes and guesses come from the same caller's jobs."""
    salt: str = ""
    """They come from jobs with the same salt only, too."""
    terms: Terms = field(default=Terms())
    """What the caller may use."""
    priority: int = 0
    """Lower ones of the same caller come first."""
    cancelled: bool = field(default=False, init=False)
    began: bool = field(default=False, init=False)
    """Whether it has ever had a slot."""
    number: int = field(default=0, init=False)
    """Its place in the order of arrival."""
    due: float = field(default=0.0, init=False)
    """Its place among its caller's jobs: see `serve.engine.callers.due`."""
    since: float = field(default=0.0, init=False)
    """When it got its slot."""
    slot: int = field(default=-1, init=False)
    """Where it is computed; -1 while it waits and after its end."""
    done: int = field(default=0, init=False)
    """Number of its tokens in the cache."""

    @property
    def owner(self) -> str:
        """Caller and salt."""
        return f"{self.caller} salt {self.salt}" if self.salt else self.caller

    @property
    def account(self) -> str:
        """Who pays for it."""
        return self.terms.account or self.caller

    @property
    def input(self) -> np.ndarray:
        """(T,) the tokens to compute when it gets a slot."""
        return self.ids

    @property
    def resumed(self) -> bool:
        """Whether it has lost its slot before."""
        return False

    @property
    def ends_at(self) -> float | None:
        """When it ends with what it has; None for never."""
        return None

    def overdue(self, now: float) -> Event | None:
        """How the job ends because its time is over; None while it is not."""
        return Expired() if self.deadline is not None and now >= self.deadline else None


@dataclass(eq=False)
class Sequence(Job):
    """One continuation of one prompt."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 128
    eos_id: int | None = None
    """The member of ``sampling.stop_ids`` whose finish reason is EOS."""
    expires_at: float | None = None
    """When to end the sequence and keep what was generated."""
    least_new_tokens: int = 1
    """It has at least so many unless its time runs out. Estimates rely on it."""
    generated: int = field(default=0, init=False)
    repeated: int = field(default=0, init=False)
    """Tokens still to be generated once more, because the sequence lost its slot."""
    kept: np.ndarray | None = field(default=None, init=False)
    """(T,) prompt and output when it lost its slot, if they are computed like a prompt."""
    weights: Weights | None = field(default=None, init=False)
    """What it began with, if it lost its slot."""
    drafted: int = field(default=0, init=False)
    """Number of tokens that were guessed and verified."""
    accepted: int = field(default=0, init=False)
    """Number of its generated tokens that were guessed."""

    @property
    def input(self) -> np.ndarray:
        return self.ids if self.kept is None else self.kept

    @property
    def resumed(self) -> bool:
        return self.weights is not None

    @property
    def length(self) -> int:
        """Number of tokens of prompt and output."""
        return len(self.ids) + self.generated

    @property
    def ends_at(self) -> float | None:
        return self.expires_at

    def overdue(self, now: float) -> Event | None:
        if self.expires_at is not None and now >= self.expires_at:
            return Job.overdue(self, now) or Ended(now, Finish.TIME_BUDGET)
        return Job.overdue(self, now)


@dataclass(eq=False)
class Scoring(Job):
    """Computes the log-probabilities of a text."""

    top: int = 0
    parts: list[Scores] = field(default_factory=list, init=False)
    """What has been computed so far."""
