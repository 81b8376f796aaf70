"""What may come next, read off earlier occurrences of the last tokens.

There is no draft model. A guess is what followed the last tokens where they occurred before: in the
sequence itself (prompt lookup, github.com/apoorvumang/prompt-lookup-decoding) or in earlier outputs
of the same caller (as in suffix decoding, arXiv:2411.04975). Following a token costs a few lookups
in a dictionary, whatever the length of the text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

NGRAMS = (4, 2)
"""Numbers of tokens by which earlier occurrences are found. In other outputs only the first."""
PRIORS = (0.1, 0.4, 0.6, 0.8, 0.9)
"""How often a match of 2 or 3, 4 to 7, 8 to 15, 16 to 31 and more tokens is right about the next
one: what is believed until the text shows another rate."""
FADE = 1 / 16
"""Weight of the newest token in what a sequence has shown."""
SLOW_FADE = 1 / 256
"""Weight of the newest token in what all sequences have shown."""


def class_of(agree: int) -> int:
    """The class of a match of so many tokens; see `PRIORS`."""
    return min(agree.bit_length(), len(PRIORS) + 1) - 2


class Memory:
    """The latest tokens of a caller's outputs.

    Args:
        size: how many tokens are kept at least; at most twice as many.
    """

    def __init__(self, size: int = 4096) -> None:
        self.size = size
        self.tokens: list[int] = []
        """Each output is followed by -1, so that no guess goes on into the next."""
        self._after: dict[tuple[int, ...], int] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Remember the tokens of an output."""
        kept = [*tokens, -1]
        if len(self.tokens) + len(kept) > 2 * self.size:
            kept = [*self.tokens, *kept][-self.size :]
            # Sequences that follow the old list keep it.
            self.tokens, self._after = [], {}
        first = max(len(self.tokens), NGRAMS[0])
        self.tokens += kept
        for end in range(first, len(self.tokens)):
            if self.tokens[end] != -1:
                self._after[tuple(self.tokens[end - NGRAMS[0] : end])] = end

    def find(self, ngram: tuple[int, ...]) -> int:
        """Index of what followed the latest occurrence of ``NGRAMS[0]`` tokens; -1 if none."""
        return self._after.get(ngram, -1)


class Memories:
    """A `Memory` for each of the latest callers.

    Args:
        size: how many callers are remembered.
    """

    def __init__(self, size: int = 64) -> None:
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


class Follower:
    """Follows a sequence token by token, and an earlier text that agrees with its end.

    Args:
        memory: earlier outputs of the caller.
        shared: how often matches of each class predicted the next token, in all sequences;
            updated in place.
    """

    def __init__(self, memory: Memory | None = None, shared: list[float] | None = None) -> None:
        self.tokens: list[int] = []
        self.agree = 0
        """How many of the last tokens agree with the text before the guess; 0 without a guess."""
        self._shared = list(PRIORS) if shared is None else shared
        self._rates = list(self._shared)
        self._memory = memory
        self._after: dict[tuple[int, ...], int] = {}
        self._text: list[int] = []  # what agrees: the sequence itself, or the memory's tokens
        self._at = 0

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens; the guess then follows the last of them."""
        for token in tokens:
            self.tokens.append(token)
            if self.agree:
                self._compare(token)
            for size in NGRAMS:
                ngram = tuple(self.tokens[-size:])
                if len(ngram) < size:
                    continue
                before = self._after.get(ngram, -1)
                self._after[ngram] = len(self.tokens)
                if size <= self.agree:
                    continue
                if before >= 0:
                    self._text, self._at, self.agree = self.tokens, before, size
                elif self._memory and size == NGRAMS[0]:
                    before = self._memory.find(ngram)
                    if before >= 0:
                        self._text, self._at, self.agree = self._memory.tokens, before, size

    def _compare(self, token: int) -> None:
        """Go one token on in the text that agrees, and count whether it was right."""
        index, right = class_of(self.agree), self._text[self._at] == token
        self._rates[index] += FADE * (right - self._rates[index])
        self._shared[index] += SLOW_FADE * (right - self._shared[index])
        self._at, self.agree = self._at + 1, self.agree + 1
        if not right or self._text[self._at] == -1:
            self.agree = 0

    def chance(self, index: int = 0) -> float:
        """How likely a token of the guess is right if all before it are."""
        return self._rates[class_of(self.agree + index)] if self.agree else 0.0

    def guess(self, count: int) -> list[int]:
        """What may follow, at most ``count`` tokens. A sequence that loops goes on as a loop."""
        if not self.agree:
            return []
        follows = self._text[self._at : self._at + count]
        if self._text is self.tokens:
            period = len(follows)
            return [follows[at % period] for at in range(count)]
        return follows[: follows.index(-1)] if -1 in follows else follows
