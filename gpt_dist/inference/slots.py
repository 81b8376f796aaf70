"""What each slot of a decoder holds: its tokens, its weights, whether it takes part in steps."""

from __future__ import annotations

import numpy as np

from gpt_dist.errors import GptDistError
from gpt_dist.inference.results import Weights
from gpt_dist.inference.sampling import SamplingParams


class Slots:
    """The state of all slots, apart from their keys and values.

    Args:
        count: number of slots.
        context: positions of a slot.
    """

    def __init__(self, count: int, context: int) -> None:
        self.count, self.context = count, context
        self.lengths = np.zeros(count, np.int64)
        """Tokens of each slot that are in the cache, also when its sequence has ended."""
        self.tokens = np.zeros(count, np.int64)
        """The token of each active slot that was chosen last; the next step runs it."""
        self.generated = np.zeros(count, np.int64)
        """How many tokens of each slot's sequence were chosen, not given."""
        self.weights: list[Weights | None] = [None] * count
        """What each slot's cache was computed with; None where it is empty."""
        self.params: dict[int, SamplingParams] = {}
        """How the active slots are continued."""
        self.claimed: set[int] = set()
        """Slots that hold a sequence, active or not."""
        self._groups: tuple[list[int], list[np.ndarray]] | None = None  # until slots come or go

    @property
    def free(self) -> list[int]:
        """Slots without a sequence, in ascending order."""
        return [slot for slot in range(self.count) if slot not in self.claimed]

    def length(self, slot: int) -> int:
        """Tokens of a slot that are in the cache."""
        return int(self.lengths[slot])

    def version(self, slot: int) -> int:
        """Version of the weights of a slot's cache; 0 if it is empty."""
        weights = self.weights[slot]
        return weights.version if weights else 0

    def extend(self, slot: int, start: int, newest: Weights) -> Weights:
        """Check that tokens can follow at ``start``, and bind an empty slot to the newest weights.

        Returns:
            The slot's weights.

        Raises:
            GptDistError: there is no such slot, it is active, or ``start`` leaves a gap.
        """
        if not 0 <= slot < self.count:
            raise GptDistError(f"slot {slot}: there are {self.count}")
        if slot in self.params:
            raise GptDistError(f"slot {slot} is active: free it before it is prefilled")
        if start > self.length(slot):
            raise GptDistError(f"slot {slot} has {self.length(slot)} tokens, none before {start}")
        bound = self.weights[slot]
        if bound is None or (start == 0 and not (slot in self.claimed and not self.length(slot))):
            bound = self.weights[slot] = newest
        return bound

    def fill(self, slot: int, length: int) -> None:
        """Note how many tokens a slot has cached, and claim it."""
        self.lengths[slot] = length
        self.claimed.add(slot)

    def activate(self, slot: int, params: SamplingParams, ids: np.ndarray, generated: int) -> None:
        """Let a slot take part in steps; all of ``ids`` but the last, or all, are cached."""
        self.params[slot], self._groups = params, None
        self.fill(slot, len(ids) - 1)
        self.tokens[slot], self.generated[slot] = ids[-1], generated

    def advance(self, slots: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> None:
        """Note that tokens were chosen after those at ``positions``, which are now cached.

        Of several for a slot, in ascending order, the last stays.
        """
        after = positions + 1
        self.tokens[slots] = tokens
        self.generated[slots] += after - self.lengths[slots]
        self.lengths[slots] = after

    def release(self, slot: int, newest: Weights) -> None:
        """End a slot's sequence. What it has cached stays while its weights are the newest."""
        if self.params.pop(slot, None):
            self._groups = None
        self.claimed.discard(slot)
        if self.weights[slot] is not newest:
            self.weights[slot], self.lengths[slot] = None, 0

    def active(self) -> tuple[list[int], list[np.ndarray]]:
        """The active slots in ascending order, and those of them together that share weights.

        Raises:
            GptDistError: one has no room left.
        """
        if self._groups is None:
            slots = sorted(self.params)
            versions = np.array([self.version(slot) for slot in slots])
            groups = [np.array(slots)[versions == version] for version in np.unique(versions)]
            self._groups = slots, groups
        for group in self._groups[1]:
            if self.lengths[group].max() >= self.context:
                full = group[self.lengths[group].argmax()]
                raise GptDistError(f"slot {full} is full: free it after {self.context} tokens")
        return self._groups
