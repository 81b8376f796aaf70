"""Text to token ids and back: GPT-2's own vocabulary, single characters, or a trained BPE.

    tokenizer = load_tokenizer("gpt2")
    tokenizer.decode(tokenizer.encode("Hello")) == "Hello"

Every tokenizer is saved as one ``tokenizer.json``, in data sets and in checkpoints, and needs
neither the network nor a cache directory.
"""

from __future__ import annotations

import codecs
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
from gpt_dist.text.gpt2_vocabulary import (
    END_OF_TEXT,
    EOT_ID,
    VOCAB_SIZE,
    byte_characters,
    encoding,
    merge_ranks,
)

if TYPE_CHECKING:
    import tokenizers
    from numpy.typing import NDArray

PADDING = "<|padding|>"
FILE_NAME = "tokenizer.json"
FORMAT_VERSION = 1
MAX_VOCAB_SIZE = 65536
"""Token shards hold uint16."""


class Tokenizer(ABC):
    """What the rest of the package knows of a tokenizer.

    Text is always taken as plain text: the string ``<|endoftext|>`` inside it does not become the
    end-of-text token.
    """

    name: str
    """``gpt2``, ``char`` or ``bpe``."""
    vocab_size: int
    eot_id: int | None
    """Id of the end-of-text token, which stands before each document; None where there is none."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            UsageError: the text has a character that the vocabulary cannot express (char only).
        """

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, tokenised on up to ``threads`` threads."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: list[str], starts: list[bool]) -> NDArray[np.uint16]:
        """Token ids of texts one after the other, as token shards hold them.

        Args:
            texts: documents, or pieces of documents cut where ids do not depend on it.
            starts: whether each text begins a document: the end-of-text token stands before it.
                The others continue the text before them.
        """
        pieces: list[NDArray[np.uint16]] = []
        for ids, start in zip(self.encode_batch(texts), starts, strict=True):
            if start and self.eot_id is not None:
                pieces.append(np.array([self.eot_id], dtype=np.uint16))
            pieces.append(np.asarray(ids, dtype=np.uint16))
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a sequence of ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UsageError: an id beyond the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for (a special token's name for special tokens).

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
        """Bytes of text that each id stands for, shape (vocab_size,); 0 for special tokens."""
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
        """What ``tokenizer.json`` holds."""

    def to_json(self) -> str:
        """``tokenizer.json`` as text, the same for equal tokenizers."""
        return json.dumps(self.to_dict(), ensure_ascii=False) + "\n"

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` into a directory, atomically."""
        write_atomically(Path(directory) / FILE_NAME, self.to_json().encode())


class Gpt2Tokenizer(Tokenizer):
    """OpenAI's GPT-2 vocabulary (50,257 ids), through tiktoken and the merge table shipped here."""

    name = "gpt2"
    vocab_size = VOCAB_SIZE
    eot_id = EOT_ID

    def encode(self, text: str) -> list[int]:
        return encoding().encode_ordinary(text)

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        return encoding().encode_ordinary_batch(texts, num_threads=threads)

    def encode_documents(self, texts: list[str], starts: list[bool]) -> NDArray[np.uint16]:
        if any(END_OF_TEXT in text for text in texts):
            return super().encode_documents(texts, starts)
        # One call for all documents, straight into an array: twice as fast for short documents.
        joined = "".join(
            END_OF_TEXT + text if start else text for text, start in zip(texts, starts, strict=True)
        )
        try:
            ids = encoding().encode_to_numpy(joined, allowed_special={END_OF_TEXT})
        except UnicodeEncodeError:  # a lone surrogate; tiktoken's other functions replace it
            return super().encode_documents(texts, starts)
        return ids.astype(np.uint16)

    @cached_property
    def _table(self) -> Sequence[bytes]:
        table = [b""] * self.vocab_size
        for piece, token in merge_ranks().items():
            table[token] = piece
        table[self.eot_id] = END_OF_TEXT.encode()
        return table

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "type": "gpt2"}


class CharTokenizer(Tokenizer):
    """One id per character, in code-point order, as nanoGPT's shakespeare_char.

    Args:
        characters: the vocabulary; sorted and made unique here.
        eot: add an end-of-text token, as the last id.

    Raises:
        UsageError: no characters, or more than token shards can hold.
    """

    name = "char"

    def __init__(self, characters: Iterable[str], eot: bool = False) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters) + eot
        self.eot_id = len(self.characters) if eot else None
        if not self.characters:
            raise UsageError("char tokenizer: the text is empty")
        check_vocab_size(self.vocab_size, "char tokenizer")
        if any("\ud800" <= character <= "\udfff" for character in self.characters):
            raise UsageError("char tokenizer: half of a surrogate pair is no character")
        # Code points → ids, as an array: encoding is then one indexing operation.
        points = _code_points(self.characters)
        self._ids = np.full(int(points[-1]) + 2, MAX_VOCAB_SIZE, dtype=np.int32)
        self._ids[points] = np.arange(len(points))

    def encode(self, text: str) -> list[int]:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if len(ids) and ids.max() == MAX_VOCAB_SIZE:
            where = int(ids.argmax())
            raise UsageError(
                f"character {text[where]!r} (position {where}) is not among the "
                f"{len(self.characters)} characters of this char tokenizer"
            )
        found: list[int] = ids.tolist()
        return found

    @cached_property
    def _table(self) -> Sequence[bytes]:
        eot = [] if self.eot_id is None else [END_OF_TEXT.encode()]
        return [character.encode() for character in self.characters] + eot

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "type": "char",
            "characters": self.characters,
            "eot": self.eot_id is not None,
        }


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


class BpeTokenizer(Tokenizer):
    """A byte-level BPE of Hugging Face ``tokenizers``, with GPT-2's pre-tokenizer.

    Args:
        backend: the trained tokenizer.
        eot: name of its end-of-text token.
        pad: name of its padding token, if it has one.

    Raises:
        UsageError: not byte-level, without that end-of-text token, or too large for token shards.
    """

    name = "bpe"

    def __init__(
        self, backend: tokenizers.Tokenizer, eot: str = END_OF_TEXT, pad: str | None = None
    ) -> None:
        self._backend = backend
        backend.encode_special_tokens = True  # in a text they are plain text
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
            vocab_size: ids wanted, the 256 bytes and the two special tokens included. A short
                text may have fewer merges to offer.

        Raises:
            UsageError: a vocabulary too small for the bytes or too large for token shards.
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
        # Its threads are the library's own (RAYON_NUM_THREADS).
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

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


def check_vocab_size(size: int, what: str, least: int = 1) -> None:
    """Refuse a vocabulary that uint16 shards cannot hold.

    Raises:
        UsageError: outside of least … 65,536.
    """
    if not least <= size <= MAX_VOCAB_SIZE:
        raise UsageError(
            f"{what}: a vocabulary of {size:,} tokens; valid are {least:,} to {MAX_VOCAB_SIZE:,} "
            "(token shards hold 16-bit ids)"
        )


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a name (``gpt2``), a ``tokenizer.json``, or a directory that holds one.

    A ``tokenizer.json`` of Hugging Face ``tokenizers`` (byte-level BPE) is understood as well.

    Raises:
        UsageError: no such file, or not a tokenizer that this version understands.
    """
    if str(name_or_path) == "gpt2":
        return Gpt2Tokenizer()
    path = Path(name_or_path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        data = json.loads(path.read_bytes())
    except OSError:
        raise UsageError(
            f"tokenizer {name_or_path}: no such tokenizer; valid are gpt2, a {FILE_NAME}, "
            "or a directory that has one"
        ) from None
    except ValueError:
        raise UsageError(f"tokenizer {path}: not JSON") from None
    try:
        return _from_dict(data)
    except UsageError as error:
        raise UsageError(f"tokenizer {path}: {error}") from None


def _from_dict(data: Any) -> Tokenizer:
    if not isinstance(data, dict):
        raise UsageError("not a mapping")
    if "model" in data and "added_tokens" in data:
        return BpeTokenizer(_backend(data))
    if data.get("format_version") != FORMAT_VERSION:
        version = data.get("format_version")
        raise UsageError(f"format_version {version!r}; this version reads {FORMAT_VERSION}")
    match data:
        case {"type": "gpt2"}:
            return Gpt2Tokenizer()
        case {"type": "char", "characters": str(characters), "eot": bool(eot)}:
            return CharTokenizer(characters, eot)
        case {"type": "bpe", "tokenizer": dict(backend), "eot": str(name)}:
            pad = data.get("pad")
            return BpeTokenizer(_backend(backend), name, pad if isinstance(pad, str) else None)
    raise UsageError(f"not a gpt2, char or bpe tokenizer (type {data.get('type')!r})")


def _backend(data: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"not a tokenizer of Hugging Face tokenizers: {error}") from None


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
