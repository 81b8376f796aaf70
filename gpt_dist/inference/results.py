"""What goes into a decoder's backend, and what a decoder returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

PREFILL = 128
"""Tokens of prompts that go through the model together."""

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


def chosen(
    tokens: np.ndarray, asked: Sequence[int | None], details: Sequence[np.ndarray], vocab_size: int
) -> list[Chosen]:
    """What was chosen in each row of a step.

    Args:
        tokens: (R,) chosen ids.
        asked: how many of the most likely tokens each row wants; None for no log-probabilities.
        details: (R, 1 + N) log-probabilities of the token and of the most likely ones, and (R, N)
            ids of those; needed if a row asks.
        vocab_size: there are no more likely tokens than this.
    """
    rows: list[Chosen] = []
    for row, (token, count) in enumerate(zip(tokens.tolist(), asked, strict=True)):
        if count is None:
            rows.append((token, None, []))
            continue
        logprobs, top = details[0][row].tolist(), details[1][row].tolist()
        best = zip(top[: min(count, vocab_size)], logprobs[1:], strict=False)
        rows.append((token, logprobs[0], list(best)))
    return rows


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
    def of(cls, rows: list[tuple[int, Chosen]], drafted: dict[int, int]) -> StepResult:
        """The result for what was chosen for slots, in the order of each slot's tokens."""
        rows.sort(key=lambda row: row[0])
        slots = [slot for slot, _ in rows]
        columns = zip(*(row for _, row in rows), strict=True)
        tokens, logprobs, top = map(list, columns) if rows else ([], [], [])
        last = [slot != after for slot, after in pairwise([*slots, -1])]
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
