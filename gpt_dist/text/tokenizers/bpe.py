"""Byte-level BPE of Hugging Face ``tokenizers``, trained here or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gpt_dist.errors import UsageError
from gpt_dist.text.cuts import checked_cut, gpt2_cut
from gpt_dist.text.gpt2_vocabulary import END_OF_TEXT, byte_characters
from gpt_dist.text.tokenizers.base import FORMAT_VERSION, Tokenizer, check_vocab_size

if TYPE_CHECKING:
    import tokenizers

PADDING = "<|padding|>"


class BpeTokenizer(Tokenizer):
    """A byte-level BPE of Hugging Face ``tokenizers``; trained here, it splits text as GPT-2 does.

    Args:
        backend: the trained tokenizer.
        eot: name of its end-of-text token.
        pad: name of its padding token, if it has one.

    Raises:
        UsageError: not byte-level, or without that end-of-text token.
    """

    name = "bpe"

    def __init__(
        self, backend: tokenizers.Tokenizer, eot: str = END_OF_TEXT, pad: str | None = None
    ) -> None:
        self._backend = backend
        backend.encode_special_tokens = True  # their names in a text are plain text
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size = backend.get_vocab_size()
        self._eot, self._pad = eot, pad
        check_vocab_size(self.vocab_size, "bpe tokenizer")
        if type(backend.decoder).__name__ != "ByteLevel":
            raise UsageError("bpe tokenizer: only byte-level BPE is supported")
        self.eot_id: int | None = backend.token_to_id(eot)
        if self.eot_id is None:
            raise UsageError(f"bpe tokenizer: no end-of-text token {eot} in its vocabulary")
        self.pad_id: int | None = None if pad is None else backend.token_to_id(pad)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learn merges from texts; the same texts always give the same tokenizer.

        Args:
            vocab_size: includes the 256 bytes and the two special tokens. A short text may give
                fewer.

        Raises:
            UsageError: a vocabulary too small for the bytes, or too large.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        special = [END_OF_TEXT, PADDING]
        check_vocab_size(vocab_size, "bpe tokenizer", least=256 + len(special))
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, pad=PADDING)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        # The library has its own threads (RAYON_NUM_THREADS).
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def safe_cut(self, text: str, limit: int) -> int:
        if self._splits_like_gpt2:
            return gpt2_cut(text, limit)
        return checked_cut(text, limit, self._pieces)

    @cached_property
    def _splits_like_gpt2(self) -> bool:
        data = json.loads(self._backend.to_str())
        match data["pre_tokenizer"]:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                return not data["normalizer"] and all(t["special"] for t in data["added_tokens"])
        return False

    def _pieces(self, text: str) -> list[list[int]]:
        """Token ids, one group for each piece of text that the pre-tokenizer makes."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        pairs = zip(encoding.word_ids, encoding.ids, strict=True)
        return [[token for _, token in group] for _, group in groupby(pairs, lambda pair: pair[0])]

    @cached_property
    def _table(self) -> Sequence[bytes]:
        to_byte = {character: byte for byte, character in enumerate(byte_characters())}
        added = self._backend.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for piece, token in self._backend.get_vocab().items():
            table[token] = piece.encode() if token in added else bytes(to_byte[c] for c in piece)
        return table

    @property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "type": "bpe",
            "tokenizer": json.loads(self._backend.to_str()),
            "eot": self._eot,
            **({} if self._pad is None else {"pad": self._pad}),
        }
