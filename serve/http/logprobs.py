"""Log-probabilities as OpenAI's completions report them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from gpt_dist.v1 import generation_pb2 as pb

LOWEST = -9999.0
"""JSON has no infinity."""


class Offsets:
    """Where each token begins in the text, in characters, as tokens arrive."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = 0

    def push(self, token: bytes) -> int:
        """The offset of the next token."""
        offset = self._length
        self._length += len(self._decoder.decode(token))
        return offset


def logprobs(
    entries: Iterable[pb.TokenLogprob], offsets: Offsets, most_likely: bool
) -> dict[str, Any]:
    """OpenAI's object for these tokens.

    Args:
        entries: tokens with their log-probabilities.
        offsets: of the tokens before them.
        most_likely: whether the most likely tokens were asked for.
    """
    found: dict[str, Any] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
    for entry in entries:
        known = entry.HasField("logprob")
        found["tokens"].append(token_text(entry.token))
        found["token_logprobs"].append(max(entry.logprob, LOWEST) if known else None)
        top = {token_text(other.token): max(other.logprob, LOWEST) for other in entry.top}
        found["top_logprobs"].append(top if known and most_likely else None)
        found["text_offset"].append(offsets.push(entry.token))
    return found


def token_text(token: bytes) -> str:
    """A token's text; as ``bytes:\\xe2\\x80`` if it is only part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
