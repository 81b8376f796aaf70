"""Decoding of ids that arrive one by one."""

from __future__ import annotations

import codecs

from gpt_dist.text.tokenizers.base import Tokenizer


class StreamDecoder:
    """Decode ids as they arrive; only whole UTF-8 characters are returned.

    The results of ``push`` and ``flush``, joined, equal ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, *ids: int) -> str:
        """The text that these ids complete; an incomplete character is held back."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        """The rest at the end: U+FFFD for a character that stayed incomplete."""
        return self._decoder.decode(b"", final=True)
