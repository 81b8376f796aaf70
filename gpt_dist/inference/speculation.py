"""Guesses of the next tokens, so that one step can verify several of them.

There is no draft model: a guess is what followed the longest earlier occurrence of the last tokens,
in the sequence itself (prompt lookup, github.com/apoorvumang/prompt-lookup-decoding) or in earlier
outputs of the same caller (suffix decoding, arXiv:2411.04975). A step runs the guesses as more rows
of the sequence, and keeps them up to the first that differs from the token chosen there. So the
tokens are those of decoding without guesses, whatever is guessed.

How many tokens to guess is a matter of cost. Each sequence counts how often a match of n tokens
predicted the next one, also where nothing was guessed. The time of a step is measured for each
number of rows. The guesses that make the most tokens per second are run, often none.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

LONGEST = 16
"""Matches are not told apart beyond this many tokens."""
MOST = 32
"""Maximum number of tokens guessed for one sequence."""
GAIN = 1.02
"""Guesses are run if they should make at least this many times the tokens per second."""
OVERHEAD = 0.005
"""Share of the time that may go into searching while guesses do not pay."""
PRIOR = 2.0
"""Weight of what all sequences have shown, in tokens, beside what one sequence has."""
FADE = 0.95
"""How fast a sequence forgets: weight of its counts after each token."""


class Memory:
    """The latest tokens of a caller's outputs.

    Args:
        size: how many tokens are kept.
    """

    def __init__(self, size: int = 8192) -> None:
        self.size = size
        self.tokens = np.zeros(0, np.int64)

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Remember the tokens of an output."""
        # The -1 keeps a match from crossing into another output.
        parts = self.tokens, np.asarray(tokens, np.int64), [-1]
        self.tokens = np.concatenate(parts)[-self.size :]


class Memories:
    """A `Memory` for each of the latest callers.

    Args:
        size: how many callers are remembered.
    """

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self._by_caller: OrderedDict[str, Memory] = OrderedDict()

    def of(self, caller: str) -> Memory | None:
        """The memory of a caller; None for an unknown one, "", who shares with nobody."""
        if not caller:
            return None
        memory = self._by_caller.setdefault(caller, Memory())
        self._by_caller.move_to_end(caller)
        if len(self._by_caller) > self.size:
            self._by_caller.popitem(last=False)
        return memory


def with_guesses(
    slots: np.ndarray,
    ids: np.ndarray,
    positions: np.ndarray,
    guesses: Mapping[int, np.ndarray],
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
        for offset, token in enumerate([first, *guesses.get(slot, ids[:0]).tolist()])
    ]
    every = np.array(rows, np.int64)
    return every[:, 0], every[:, 1], every[:, 2]


def lookup(tokens: np.ndarray, earlier: np.ndarray, most: int = MOST) -> tuple[np.ndarray, int]:
    """Guess what follows a sequence.

    Args:
        tokens: (T,) the sequence.
        earlier: (N,) other text in which to look, -1 between its parts.
        most: maximum number of tokens to guess.

    Returns:
        The guess, possibly empty, and how many of the last tokens agree at the place that it is
        from, at most `LONGEST`. The sequence itself goes before the other text where they agree as
        far, and later places before earlier ones.
    """
    guess, agree = tokens[:0], 0
    for text, own in ((tokens[:-1], True), (earlier[:-1], False)):
        ends, length = _longest(text, tokens)
        if length > agree:
            follows = tokens[ends + 1 :] if own else earlier[ends + 1 :]
            if own:  # a loop goes on as a loop
                follows = np.resize(follows, most)
            elif (limits := np.flatnonzero(follows < 0)).size:
                follows = follows[: limits[0]]
            if len(follows):
                guess, agree = follows[:most], length
    return guess, agree


def _longest(text: np.ndarray, suffix: np.ndarray) -> tuple[int, int]:
    """Where the longest suffix ends for the last time in a text, and its length."""
    ends = np.flatnonzero(text == suffix[-1])
    if not len(ends):
        return -1, 0
    length = 1
    while length < min(LONGEST, len(suffix)):
        longer = ends[ends >= length]
        longer = longer[text[longer - length] == suffix[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    return int(ends[-1]), length


class StepTimes:
    """The measured time of a step by its number of rows.

    Args:
        keep: measurements kept of each number of rows; their median counts.
        stale: steps after which a measurement is forgotten.
    """

    def __init__(self, keep: int = 5, stale: int = 2000) -> None:
        self.keep, self.stale = keep, stale
        self._now = 0
        self._measured: dict[int, list[float]] = {}
        self._medians: dict[int, float] = {}
        self._updated: dict[int, int] = {}

    def add(self, rows: int, seconds: float) -> None:
        """Note a measurement."""
        self._now += 1
        kept = self._measured.setdefault(rows, [])
        kept.append(seconds)
        del kept[: -self.keep]
        self._medians[rows] = sorted(kept)[len(kept) // 2]
        self._updated[rows] = self._now
        if self._now % self.stale == 0:
            for count in [n for n, at in self._updated.items() if at <= self._now - self.stale]:
                del self._measured[count], self._medians[count], self._updated[count]

    def estimate(self, rows: int) -> np.ndarray:
        """Seconds of a step with 0, 1, ..., ``rows`` rows; inf where no step was nearly as wide.

        Between two measured numbers it is interpolated. Up to twice the highest one a row costs
        what it costs up to there, as far as that is known: so wider steps are tried by and by.
        """
        if not self._medians:
            return np.full(rows + 1, np.inf)
        counts = np.array(sorted(self._medians))
        times = np.array([self._medians[count] for count in counts])
        # More rows never take less time; where it seems so, something else took the time.
        times = np.minimum.accumulate(times[::-1])[::-1]
        every = np.arange(rows + 1)
        result: np.ndarray = np.interp(every, counts, times)
        if len(counts) > 1 and counts[-1] < rows:
            slope = (times[-1] - times[0]) / (counts[-1] - counts[0])
            result += slope * np.maximum(every - counts[-1], 0)
        result[every > 2 * counts[-1]] = np.inf
        return result


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
        self._memories: list[Memory | None] = [None] * slots
        # By length of the match: tokens predicted rightly, and predicted at all.
        self._hits = np.zeros((slots, LONGEST + 1))
        self._trials = np.zeros((slots, LONGEST + 1))
        self._all_hits, self._all_trials = np.zeros(LONGEST + 1), np.full(LONGEST + 1, 1.0)
        self._guesses: dict[int, tuple[np.ndarray, int]] = {}
        self._drafts: dict[int, np.ndarray] = {}
        self._pause = np.zeros(slots, np.int64)
        self._started = 0.0

    def begin(self, slot: int, memory: Memory | None = None) -> None:
        """Start a sequence; ``memory`` has other text of its caller."""
        self._memories[slot] = memory
        for counts in (self._hits, self._trials, self._pause):
            counts[slot] = 0

    def propose(
        self, texts: Mapping[int, Callable[[], np.ndarray]], room: Mapping[int, int]
    ) -> dict[int, np.ndarray]:
        """Guesses that are worth their rows in the next step, by slot.

        Args:
            texts: for each active slot a function that returns its tokens.
            room: tokens that may be guessed for each slot.
        """
        self._started = self.clock()
        empty = np.zeros(0, np.int64)
        self._guesses = {}
        for slot, tokens in texts.items():
            if self._pause[slot] > 0:
                self._pause[slot] -= 1
                continue
            memory = self._memories[slot]
            self._guesses[slot] = lookup(tokens(), memory.tokens if memory else empty)
        lengths = self._choose(len(texts), room)
        self._drafts = {slot: self._guesses[slot][0][:n] for slot, n in lengths.items()}
        now = self.clock()
        if self._guesses:
            self._rest(now - self._started)
        self._started = now
        return self._drafts

    def learn(self, tokens: Mapping[int, list[int]]) -> None:
        """Note what the step chose for each slot. Call it right after the step."""
        rows = sum(1 + len(self._drafts.get(slot, ())) for slot in tokens)
        self.times.add(rows, self.clock() - self._started)
        for slot, chosen in tokens.items():
            if slot not in self._guesses:
                continue
            guess, agree = self._guesses[slot]
            for index, (wanted, token) in enumerate(zip(guess, chosen, strict=False)):
                self._count(slot, min(agree + index, LONGEST), wanted == token)

    def _count(self, slot: int, agree: int, right: bool) -> None:
        self._hits[slot] *= FADE
        self._trials[slot] *= FADE
        for hits, trials in (
            (self._hits[slot], self._trials[slot]),
            (self._all_hits, self._all_trials),
        ):
            hits[agree] += right
            trials[agree] += 1
        if self._all_trials[agree] > 1000:
            self._all_hits[agree] /= 2
            self._all_trials[agree] /= 2

    def _chances(self, slot: int) -> np.ndarray:
        """How likely each token of the slot's guess is to be reached and right, one by one."""
        guess, agree = self._guesses[slot]
        shared = self._all_hits / self._all_trials
        rates = (self._hits[slot] + PRIOR * shared) / (self._trials[slot] + PRIOR)
        lengths = np.minimum(agree + np.arange(len(guess)), LONGEST)
        return np.cumprod(rates[lengths])

    def _choose(self, active: int, room: Mapping[int, int]) -> dict[int, int]:
        """How many tokens of each guess to run, for the most tokens per second."""
        entries = [
            (chance, slot)
            for slot, (guess, _) in self._guesses.items()
            if len(guess)
            for chance in self._chances(slot)[: min(room[slot], MOST)]
            if chance > 0.01
        ]
        if not entries:
            return {}
        entries.sort(key=lambda entry: -entry[0])
        entries = entries[: max(0, self.rows - active)]
        tokens = active + np.cumsum([0.0] + [chance for chance, _ in entries])
        seconds = self.times.estimate(active + len(entries))[active:]
        if not np.isfinite(seconds[0]) or seconds[0] <= 0:
            return {}
        rate = tokens / seconds
        best = int(rate.argmax())
        if rate[best] < GAIN * rate[0]:
            return {}
        lengths: dict[int, int] = {}
        for _, slot in entries[:best]:
            lengths[slot] = lengths.get(slot, 0) + 1
        return lengths

    def _rest(self, seconds: float) -> None:
        """Pause searches that did not pay, so that they take no more than `OVERHEAD`."""
        step = self.times.estimate(len(self._guesses))[-1]
        if np.isfinite(step) and step > 0:
            pause = min(int(seconds / (OVERHEAD * step)), 32)
            for slot in self._guesses.keys() - self._drafts.keys():
                self._pause[slot] = pause
