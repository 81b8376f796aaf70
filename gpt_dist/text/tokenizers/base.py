"""What every tokenizer has in common."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt_dist.errors import UsageError
from gpt_dist.files import write_atomically
from gpt_dist.text.cuts import gpt2_cut

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.unsignedinteger[Any]]
    """Token ids as shards hold them: uint16 or uint32."""

FILE_NAME = "tokenizer.json"
FORMAT_VERSION = 1
MAX_VOCAB_SIZE = 1 << 20
"""A larger vocabulary is taken for a mistake."""


class Tokenizer(ABC):
    """The interface of all tokenizers.

    Text is always plain text: the string ``<|endoftext|>`` in it does not become the end-of-text
    token.
    """

    name: str
    """``gpt2``, ``char`` or ``bpe``."""
    vocab_size: int
    eot_id: int | None
    """Id of the end-of-text token, which precedes each document; None where there is none."""

    @property
    def token_dtype(self) -> type[np.unsignedinteger[Any]]:
        """Type of the ids in token shards: 16 bits where they are enough."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            UsageError: the text has a character that is not in the vocabulary (char only).
        """

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, tokenised on up to ``threads`` threads."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: list[str], starts: list[bool]) -> Ids:
        """Token ids of consecutive texts, as token shards hold them: shape (n,).

        Args:
            texts: documents, or pieces of documents from ``safe_cut``.
            starts: whether each text begins a document; the end-of-text token is put before it.
                The others continue the previous text.
        """
        pieces = [np.empty(0, dtype=self.token_dtype)]
        for ids, start in zip(self.encode_batch(texts), starts, strict=True):
            if start and self.eot_id is not None:
                pieces.append(np.array([self.eot_id], dtype=self.token_dtype))
            pieces.append(np.asarray(ids, dtype=self.token_dtype))
        return np.concatenate(pieces)

    def safe_cut(self, text: str, limit: int) -> int:
        """The last place, at most ``limit``, where a cut changes no token id; see ``cuts.py``.

        Returns:
            The length of the first part; 0 where there is no such place.
        """
        return gpt2_cut(text, limit)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a sequence of ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UsageError: an id beyond the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; of a special token, its name.

        Raises:
            UsageError: an id beyond the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise UsageError(
                f"token id {token}: the {self.name} tokenizer has ids 0 to {self.vocab_size - 1}"
            )
        return self._table[token]

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32]:
        """Bytes of text of each id, shape (vocab_size,); 0 for special tokens."""
        lengths = np.array([len(piece) for piece in self._table], dtype=np.int32)
        lengths[list(self._special_ids)] = 0
        return lengths

    @property
    @abstractmethod
    def _table(self) -> Sequence[bytes]:
        """The bytes of every id."""

    @property
    def _special_ids(self) -> frozenset[int]:
        return frozenset() if self.eot_id is None else frozenset({self.eot_id})

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The content of ``tokenizer.json``."""

    def to_json(self) -> str:
        """``tokenizer.json`` as text; equal tokenizers give equal text."""
        return json.dumps(self.to_dict(), ensure_ascii=False) + "\n"

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` into a directory, atomically."""
        write_atomically(Path(directory) / FILE_NAME, self.to_json().encode())


def check_vocab_size(size: int, what: str, least: int = 1) -> None:
    """Refuse a vocabulary outside of ``least`` … ``MAX_VOCAB_SIZE`` tokens.

    Raises:
        UsageError: naming ``what``.
    """
    if not least <= size <= MAX_VOCAB_SIZE:
        raise UsageError(
            f"{what}: a vocabulary of {size:,} tokens; valid are {least:,} to {MAX_VOCAB_SIZE:,}"
        )
