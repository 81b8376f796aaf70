"""Knows which tokens each slot has cached, and places new prompts where they reuse the most.

Token ids only: `gpt_dist.inference.decoder.Decoder` tells it what it caches, and moves the keys and
values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from gpt_dist.inference.results import PREFILL

MIN_REUSE = 16
"""A shorter common prefix is computed again: reusing it would not pay."""
ALIGNMENT = PREFILL
"""In deterministic mode prompts are computed in chunks of this many tokens, counted from 0."""


@dataclass(frozen=True)
class Place:
    """Where a prompt goes, and what has to be copied for it."""

    slot: int
    source: int = -1
    """The slot that has the prefix; `slot` itself if the prefix is used in place, -1 if none."""
    length: int = 0
    """Tokens of the prompt that are reused."""
    refuge: int = -1
    """The slot to which the present contents of `slot` are copied first, or -1."""
    copied: int = 0
    """Tokens whose keys and values are copied."""


class PrefixCache:
    """The tokens in each slot's cache, and the order in which the slots were used.

    Args:
        slots: number of slots.
        context: positions of a slot.
        deterministic: reuse only what prefill computed, in whole chunks: a step adds in another
            order.
    """

    def __init__(self, slots: int, context: int, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self._tokens = np.zeros((slots, context), np.int64)
        self._prefilled = np.zeros(slots, np.int64)
        """How many tokens of each slot prefill computed, not steps. Kept in deterministic mode."""
        self._owners = np.full(slots, "", object)
        """Whose tokens they are. Others may not even learn from the time that they are there."""
        self._used = np.zeros(slots, np.int64)
        self._now = itertools.count(1)

    def write(self, slot: int, start: int, tokens: np.ndarray) -> None:
        """Note that ``tokens`` were prefilled at positions ``start``, ..., and nothing follows."""
        end = start + len(tokens)
        self._tokens[slot, start:end] = tokens
        self._prefilled[slot] = end if start <= self._prefilled[slot] else self._prefilled[slot]

    def append(self, slots: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> None:
        """Note that a step has cached tokens, each at a position in a slot."""
        self._tokens[slots, positions] = tokens
        if self.deterministic:
            slots, positions = slots[::-1], positions[::-1]  # of several in a slot the first counts
            self._prefilled[slots] = np.minimum(self._prefilled[slots], positions)

    def tokens(self, slot: int, length: int) -> np.ndarray:
        """(length,) the first tokens of a slot."""
        return self._tokens[slot, :length]

    def copy(self, source: int, target: int, length: int) -> None:
        """Note that the first ``length`` tokens of one slot are all that another holds."""
        self._tokens[target, :length] = self._tokens[source, :length]
        self._prefilled[target] = min(self._prefilled[source], length)
        self._used[target], self._owners[target] = self._used[source], self._owners[source]

    def give(self, slot: int, owner: str) -> None:
        """Note whose tokens are in the slot from now on."""
        self._owners[slot] = owner

    def touch(self, slot: int) -> None:
        """Note that the slot was used just now."""
        self._used[slot] = next(self._now)

    def longest(self, prompt: np.ndarray, lengths: np.ndarray, owner: str = "") -> tuple[int, int]:
        """Find the longest cached prefix of a prompt.

        Args:
            prompt: (T,) token ids.
            lengths: (slots,) tokens in each slot that may be reused.
            owner: whose tokens may be reused.

        Returns:
            Slot and number of tokens, or (-1, 0) if fewer than `MIN_REUSE` agree.
        """
        lengths = np.where(self._owners == owner, self._reusable(lengths), 0)
        width = min(len(prompt), int(lengths.max()))
        if width < MIN_REUSE:
            return -1, 0
        same = self._tokens[:, :width] == prompt[:width]
        found = np.minimum(same.cumprod(1).sum(1), lengths)
        if self.deterministic:
            found = np.where(found < len(prompt), found // ALIGNMENT * ALIGNMENT, found)
        source = int(found.argmax())
        length = int(found[source])
        return (source, length) if length >= MIN_REUSE else (-1, 0)

    def place(
        self,
        prompt: np.ndarray,
        lengths: np.ndarray,
        free: list[int],
        cheap: list[int],
        most: int,
        owner: str = "",
    ) -> Place:
        """Choose the slot for a prompt. Changes nothing.

        A slot whose contents the prompt continues is used in place. Otherwise the prompt goes to
        an empty slot, or to the one that was used longest ago.

        Args:
            prompt: (T,) token ids.
            lengths: (slots,) tokens in each slot that may be reused.
            free: slots without a sequence.
            cheap: those of them that may be used, at least one. If they hold something, and
                another free slot holds something older or nothing, it is copied there.
            most: tokens that may be copied.
            owner: whose prompt it is; only the owner's tokens are reused.
        """
        source, length = self.longest(prompt, lengths, owner)
        kept = self._reusable(lengths)
        if source in cheap and self._lost(source, prompt, int(kept[source])) < MIN_REUSE:
            return Place(source, source, length)

        def age(slot: int) -> tuple[bool, int]:
            return bool(kept[slot] >= MIN_REUSE), int(self._used[slot])

        slot = min(cheap, key=age)
        copied = length if slot != source else 0
        if copied > most:
            length = most // ALIGNMENT * ALIGNMENT if self.deterministic else most
            source, length = (source, length) if length >= MIN_REUSE else (-1, 0)
            copied = length
        refuge = -1
        others = [other for other in free if other not in (slot, source)]
        size = int(lengths[slot])
        if others and kept[slot] >= MIN_REUSE and copied + size <= most:
            oldest = min(others, key=age)
            if age(oldest) < age(slot):
                refuge, copied = oldest, copied + size
        return Place(slot, source, length, refuge, copied)

    def _lost(self, slot: int, prompt: np.ndarray, size: int) -> int:
        """Of the first ``size`` tokens of a slot, those that a prompt would overwrite there."""
        width = min(size, len(prompt))
        same = self._tokens[slot, :width] == prompt[:width]
        return size - int(same.cumprod().sum())

    def _reusable(self, lengths: np.ndarray) -> np.ndarray:
        return np.minimum(lengths, self._prefilled) if self.deterministic else lengths
