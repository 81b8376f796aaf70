"""What goes into the scheduler and what comes out: jobs and events."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np

from gpt_dist.inference.decoder import Scores
from gpt_dist.inference.sampling import SamplingParams


class QueueFull(Exception):
    """There is no room for more requests; nothing was submitted."""


class Finish(IntEnum):
    """Why a sequence ended; values of ``gpt_dist.v1.FinishReason``."""

    LENGTH = 1
    EOS = 2
    STOP_SEQUENCE = 3
    STOP_TOKEN = 4
    CONTEXT_FULL = 5
    TIME_BUDGET = 6


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt's computation begins."""

    at: float
    cached_tokens: int
    weights_version: str


@dataclass(frozen=True, slots=True)
class Token:
    """One more token, with its log-probability and the most likely (id, log-probability)."""

    at: float
    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing follows; ``token`` is the stop token, which is no part of the sequence."""

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
    """The engine failed; nothing follows."""

    message: str


Event = Started | Token | Ended | Scored | Expired | Lost


class Listener(Protocol):
    """Who wants to know; called on the other side's thread."""

    def __call__(self, event: Event) -> None: ...


@dataclass(eq=False)
class Job:
    """Anything that can be submitted.

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
    """Which of ``sampling.stop_ids`` ends with EOS."""
    expires_at: float | None = None
    """When to end with what there is."""
    slot: int = field(default=-1, init=False)
    done: int = field(default=0, init=False)
    """Tokens of the prompt that are in the cache."""
    generated: int = field(default=0, init=False)


@dataclass(eq=False)
class Scoring(Job):
    """Log-probabilities of a text."""

    top: int = 0
