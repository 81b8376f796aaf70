"""What goes into a decoder's backend, and what a decoder returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Chosen = tuple[int, float | None, list[tuple[int, float]]]
"""A token, its log-probability, and the most likely (id, log-probability) at its place."""


@dataclass(frozen=True)
class Weights:
    """Weights prepared by `gpt_dist.inference.decoder.Decoder.load_weights`."""

    version: int
    data: Any


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt."""

    slot: int
    ids: np.ndarray
    """(n,) tokens, at least one."""
    start: int
    """Position of the first of them."""


@dataclass(frozen=True)
class StepResult:
    """What one step chose: an entry for each token, those of a slot together, slots ascending."""

    slots: list[int]
    tokens: list[int]
    logprobs: list[float | None]
    """Natural log-probability of the token before any processing, where the slot asked for it."""
    top: list[list[tuple[int, float]]]
    """(token id, log-probability) of the most likely tokens, as many as the slot asked for."""
    last: list[bool]
    """Whether it is the slot's last token of this step. The others were guessed."""
    drafted: dict[int, int]
    """How many tokens were guessed, by slot."""

    @classmethod
    def of(cls, chosen: Mapping[int, Sequence[Chosen]], drafted: dict[int, int]) -> StepResult:
        """The result for what was chosen, by slot."""
        rows = [(slot, *each) for slot, tokens in chosen.items() for each in tokens]
        slots, tokens, logprobs, top = map(list, zip(*rows, strict=True)) if rows else ([],) * 4
        last = [slots[at : at + 2] != [slot, slot] for at, slot in enumerate(slots)]
        return cls(slots, tokens, logprobs, top, last, drafted)


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of part of a text: those of the tokens at ``start``, ``start`` + 1, ..."""

    start: int
    logprobs: np.ndarray
    """(n,) natural log-probability of each token, given all tokens before it."""
    top_ids: np.ndarray
    """(n, N) ids of the most likely tokens at its place, in descending order."""
    top_logprobs: np.ndarray
    """(n, N) their log-probabilities."""
