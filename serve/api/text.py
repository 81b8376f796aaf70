"""Turns tokens into text as they arrive: whole characters, cut exactly at stop sequences."""

from __future__ import annotations

from collections.abc import Sequence

from gpt_dist.text.tokenizers import StreamDecoder, Tokenizer


class StopMatcher:
    """Finds the first stop sequence that is completed, one character at a time.

    Each sequence is matched with the algorithm of Knuth, Morris and Pratt (1977). It takes constant
    amortised time per character and always knows the length of the current partial match. The
    result does not depend on how the text is split. If a character completes several sequences, the
    longest one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self._failures = [_failures(stop) for stop in stops]
        self._matched = [0] * len(stops)

    @property
    def open(self) -> int:
        """Number of characters at the end of the text that may begin a match."""
        return max(self._matched, default=0)

    def push(self, character: str) -> str | None:
        """Feed one character; returns the stop sequence that it completes, if any."""
        found = None
        for index, stop in enumerate(self.stops):
            matched, failures = self._matched[index], self._failures[index]
            while matched and stop[matched] != character:
                matched = failures[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                matched = failures[matched - 1]
                if found is None or len(stop) > len(found):
                    found = stop
            self._matched[index] = matched
        return found


def _failures(stop: str) -> list[int]:
    """For each prefix of ``stop``, the length of its longest proper prefix that is its suffix."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        length += stop[index] == stop[length]
        table[index] = length
    return table


class TextAssembler:
    """The text of one continuation, returned only once it can no longer change.

    Args:
        tokenizer: decodes the tokens.
        stops: stop sequences, not empty.
        include_stop: end the text after the stop sequence instead of before it.
        min_tokens: ignore stop sequences that earlier tokens complete.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopMatcher(stops)
        self._include_stop, self._min_tokens = include_stop, min_tokens
        self._held = ""
        self._count = 0
        self.matched: str | None = None
        """The stop sequence that ended the text."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that became final. After a match this is always empty."""
        self._count += 1
        return self._add(self._decoder.push(token))

    def flush(self) -> str:
        """Return the rest of the text, after the last token."""
        text = self._add(self._decoder.flush())
        if self.matched is None:
            text, self._held = text + self._held, ""
        return text

    def _add(self, text: str) -> str:
        if self.matched is not None:
            return ""
        if not self._matcher.stops:
            return text
        for index, character in enumerate(text):
            stop = self._matcher.push(character)
            if stop is not None and self._count >= self._min_tokens:
                self.matched = stop
                whole = self._held + text[: index + 1]
                self._held = ""
                return whole if self._include_stop else whole[: len(whole) - len(stop)]
        whole = self._held + text
        cut = len(whole) - self._matcher.open
        self._held = whole[cut:]
        return whole[:cut]
