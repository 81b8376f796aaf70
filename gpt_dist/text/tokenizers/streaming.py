"""Text out of ids that come one by one."""

from __future__ import annotations

import codecs

from gpt_dist.text.tokenizers.base import Tokenizer


class StreamDecoder:
    """Decode ids as they come, giving out only whole UTF-8 characters.

    All that ``push`` and ``flush`` return, joined, is ``tokenizer.decode`` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, *ids: int) -> str:
        """The text that these ids complete; a character still in parts is held back."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)
