"""Guesses of the next tokens, so that one step can verify several of them.

A step runs guesses (`gpt_dist.inference.lookup`) as more rows of the sequence. It keeps them up to
the first that differs from the token chosen there. So the tokens are those of decoding without
guesses, whatever is guessed.

How many tokens to guess is a matter of cost. Each sequence counts how often a match of n tokens
predicted the next one, also where nothing was guessed. The time of a step is measured for each
number of rows. The guesses that make the most tokens per second are run, often none; where a wider
step costs so much that even a certain guess would not pay, nothing is looked up at all.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import numpy as np

from gpt_dist.inference.lookup import PRIORS, Follower, Memory

MOST = 32
"""Maximum number of tokens guessed for one sequence."""
GAIN = 1.05
"""Guesses are run if they should make at least this many times the tokens per second."""
UNLIKELY = 0.01
"""A token that is less likely to be reached and right is not guessed."""
REST = 4
"""Steps from one look for guesses to the next while none is worth its row; where there are more
sequences, as many as these, because a look takes time for each."""
PATIENCE = 8
"""Steps after a guess in which there is no rest."""
TRUSTED = 3
"""Measurements of a number of rows that are believed."""
REVIEW = 32
"""Measured steps after which the times are looked at again."""


def with_guesses(
    slots: np.ndarray,
    ids: np.ndarray,
    positions: np.ndarray,
    guesses: Mapping[int, Sequence[int]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a step: each slot's last token, then what is guessed to follow it.

    Args:
        slots: (k,) active slots.
        ids: (k,) their last tokens.
        positions: (k,) where those are in the sequences.
        guesses: tokens by slot; those of other slots are ignored.

    Returns:
        Slots, token ids and positions, (R,) each.
    """
    rows = [
        (slot, token, position + offset)
        for slot, first, position in zip(
            slots.tolist(), ids.tolist(), positions.tolist(), strict=True
        )
        for offset, token in enumerate([first, *guesses.get(slot, ())])
    ]
    every = np.array(rows, np.int64)
    return every[:, 0], every[:, 1], every[:, 2]


class StepTimes:
    """The measured time of a step by its number of rows, in units of its own.

    The speed of the machine changes, and steps of some widths are rare. So each measurement is
    divided by the pace: how long the latest steps took, beside earlier ones as wide as they.

    Args:
        keep: measurements kept of each number of rows, and of the pace; their median counts.
        stale: measured steps after which a measurement is forgotten.
    """

    def __init__(self, keep: int = 5, stale: int = 500) -> None:
        self.keep, self.stale = keep, stale
        self._now = 0
        self._measured: dict[int, deque[float]] = {}
        self._paces: deque[float] = deque([1.0], keep)
        self._updated: dict[int, int] = {}
        self._least: dict[int, float] = {}

    def add(self, rows: int, seconds: float) -> None:
        """Note a measurement."""
        self._now += 1
        kept = self._measured.setdefault(rows, deque(maxlen=self.keep))
        if len(kept) < TRUSTED or self._now % REVIEW == 0:
            self._least = {}
        if kept:
            self._paces.append(seconds / median(kept))
        kept.append(seconds / median(self._paces))
        self._updated[rows] = self._now
        if self._now % self.stale == 0:
            for count in [n for n, at in self._updated.items() if at <= self._now - self.stale]:
                del self._measured[count], self._updated[count]

    def _typical(self) -> Iterator[float]:
        """The time of each measured number of rows, from the lowest on.

        Measured only once or twice, a step may have been disturbed. What it took beyond the next
        lower number of rows then counts in part, so that it is tried again.
        """
        before = math.inf
        for _, kept in sorted(self._measured.items()):
            time = median(kept)
            trust = min(1.0, len(kept) / TRUSTED)
            before = before + (time - before) * trust if time > before else time
            yield before

    def estimate(self, rows: int) -> np.ndarray:
        """The time of a step with 0, 1, ..., ``rows`` rows; inf where no step was nearly as wide.

        Between two measured numbers it is interpolated. Up to twice the highest one a row costs
        what it costs up to there, as far as that is known: so wider steps are tried by and by.
        """
        if not self._measured:
            return np.full(rows + 1, np.inf)
        counts = np.array(sorted(self._measured))
        # More rows never take less time; where it seems so, something else took the time.
        times = np.minimum.accumulate(np.array(list(self._typical()))[::-1])[::-1]
        every = np.arange(rows + 1)
        result: np.ndarray = np.interp(every, counts, times)
        if len(counts) > 1 and counts[-1] < rows:
            slope = (times[-1] - times[0]) / (counts[-1] - counts[0])
            result += slope * np.maximum(every - counts[-1], 0)
        result[every > 2 * counts[-1]] = np.inf
        return result

    def least_chance(self, active: int) -> float:
        """How likely guesses must be to be worth their rows beside ``active`` sequences.

        Above 1 no guess is.
        """
        if active not in self._least:
            seconds = self.estimate(active + MOST)[active:]
            more = np.arange(1, MOST + 1)
            with np.errstate(invalid="ignore"):
                chances = active * (GAIN * seconds[1:] / seconds[0] - 1) / more
            self._least[active] = float(np.nan_to_num(chances, nan=np.inf).min())
        return self._least[active]


class Speculator:
    """Chooses what to guess for each slot, and learns from what came.

    Args:
        slots: number of slots.
        rows: maximum number of rows of a step.
        clock: the time in seconds.
    """

    def __init__(
        self, slots: int, rows: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.rows, self.clock = rows, clock
        self.times = StepTimes()
        self._shared = list(PRIORS)
        self._memories: list[Memory | None] = [None] * slots
        self._followers = [Follower() for _ in range(slots)]
        self._rest = 0
        self._vain = PATIENCE
        self._awake = False
        self._started = 0.0
        self._count = 0

    def begin(self, slot: int, memory: Memory | None = None) -> None:
        """Start a sequence; ``memory`` has other text of its caller."""
        self._memories[slot], self._rest = memory, 0
        self.restart(slot)

    def restart(self, slot: int) -> None:
        """Forget the tokens of a slot; they are asked for again."""
        self._followers[slot] = Follower(self._memories[slot], self._shared)

    def propose(
        self,
        slots: Sequence[int],
        news: Callable[[int, int], list[int]],
        room: Callable[[int], int],
    ) -> dict[int, list[int]]:
        """Guesses that are worth their rows in the next step, by slot.

        Args:
            slots: the active slots.
            news: returns the tokens of a slot from an index on.
            room: returns how many tokens may be guessed for a slot.
        """
        self._started = self.clock()  # choosing guesses is part of what they cost
        drafts: dict[int, list[int]] = {}
        self._rest -= 1
        self._awake = bool(slots) and self._rest <= 0
        if self._awake:
            self._rest, self._vain = max(REST, len(slots)), self._vain + 1
            if (least := self.times.least_chance(len(slots))) <= 1:
                for slot in slots:
                    follower = self._followers[slot]
                    follower.extend(news(slot, len(follower.tokens)))
                likely = [slot for slot in slots if self._followers[slot].chance() >= least]
                drafts = self._choose(likely, len(slots), room, least)
            if drafts:
                self._vain = 0
            if self._vain < PATIENCE:
                self._rest = 0
        self._count = len(slots) + sum(map(len, drafts.values()))
        return drafts

    def learn(self) -> None:
        """Note how long the step took. Call it right after the step."""
        if self._awake:
            self.times.add(self._count, self.clock() - self._started)

    def _choose(
        self, slots: Sequence[int], active: int, room: Callable[[int], int], least: float
    ) -> dict[int, list[int]]:
        """Guesses for ``slots``, as long as makes the most tokens per second.

        Tokens less than half as likely as is worth a row are not considered.
        """
        guesses: dict[int, list[int]] = {}
        entries: list[tuple[float, int]] = []
        for slot in slots:
            follower = self._followers[slot]
            guesses[slot] = follower.guess(min(room(slot), MOST))
            chance = 1.0
            for index in range(len(guesses[slot])):
                chance *= follower.chance(index)
                if chance < max(UNLIKELY, least / 2):
                    break
                entries.append((chance, slot))
        entries.sort(key=lambda entry: -entry[0])
        entries = entries[: max(0, self.rows - active)]
        if not entries:
            return {}
        tokens = active + np.cumsum([0.0] + [chance for chance, _ in entries])
        rate = tokens / self.times.estimate(active + len(entries))[active:]
        best = int(rate.argmax())
        if rate[best] < GAIN * rate[0]:
            return {}
        chosen = [slot for _, slot in entries[:best]]
        return {slot: guesses[slot][: chosen.count(slot)] for slot in dict.fromkeys(chosen)}
