"""OpenAI's GPT-2 vocabulary, shipped in the package: no network, no cache directory."""

from __future__ import annotations

import base64
import gzip
import hashlib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from gpt_dist.errors import GptDistError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 50257
EOT_ID = 50256

R50K_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""Checksum of the decompressed merge table; tiktoken checks its download against the same."""


@cache
def merge_ranks() -> dict[bytes, int]:
    """Each token except the special one, with its id, which is also its rank among the merges.

    Raises:
        GptDistError: the file in the package is damaged.
    """
    asset = resources.files("gpt_dist.text") / "assets" / "gpt2.tiktoken.gz"
    try:
        data = gzip.decompress(asset.read_bytes())
    except (OSError, EOFError) as error:
        raise GptDistError(f"{asset}: cannot be read ({error}); reinstall gpt_dist") from None
    if hashlib.sha256(data).hexdigest() != R50K_SHA256:
        raise GptDistError(f"{asset}: not GPT-2's merge table (sha256 differs); reinstall gpt_dist")
    pairs = (line.split() for line in data.splitlines())
    return {base64.b64decode(piece): int(rank) for piece, rank in pairs}


@cache
def encoding() -> tiktoken.Encoding:
    """tiktoken's encoder of this vocabulary."""
    import tiktoken

    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        # GPT-2's pattern with tiktoken's possessive quantifiers, which make it fast.
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks=merge_ranks(),
        special_tokens={END_OF_TEXT: EOT_ID},
    )


def byte_characters() -> list[str]:
    """The character that GPT-2 (encoder.py of openai/gpt-2) writes for each byte, 0 to 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
