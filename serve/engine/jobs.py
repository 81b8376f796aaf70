"""Jobs, which go into the scheduler, and events, which come out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np

from gpt_dist.inference.decoder import Scores
from gpt_dist.inference.sampling import SamplingParams


class QueueFull(Exception):
    """The queue has no room for all of the jobs; none was submitted."""


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
    """The engine failed, and the job with it."""

    message: str


Event = Started | Token | Ended | Scored | Expired | Lost


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
    cancelled: bool = field(default=False, init=False)


@dataclass(eq=False)
class Sequence(Job):
    """One continuation of one prompt."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 128
    eos_id: int | None = None
    """The member of ``sampling.stop_ids`` whose finish reason is EOS."""
    expires_at: float | None = None
    """When to end the sequence and keep what was generated."""
    slot: int = field(default=-1, init=False)
    done: int = field(default=0, init=False)
    """Number of prompt tokens in the cache."""
    generated: int = field(default=0, init=False)


@dataclass(eq=False)
class Scoring(Job):
    """Computes the log-probabilities of a text."""

    top: int = 0
