"""Write a data set shard by shard, so that a kill at any moment loses little and breaks nothing.

During the work the directory holds ``prepare.journal``: the arguments, the finished shards, how
much of the open ones is on the disk, and where to resume reading. ``dataset.json`` is written last;
without it the directory is not a data set.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_dist.data.dataset import (
    DATASET_FILE,
    DATASET_FORMAT_VERSION,
    JOURNAL_FILE,
    SPLITS,
    Split,
    migrated,
)
from gpt_dist.data.preparation.documents import Position
from gpt_dist.data.preparation.tokenize_pool import Cursor, Tokens
from gpt_dist.data.shards import ShardWriter
from gpt_dist.errors import GptDistError
from gpt_dist.files import sync_directory, write_atomically
from gpt_dist.text.tokenizers import FILE_NAME, Tokenizer

if TYPE_CHECKING:
    import numpy as np


@dataclass
class SplitWriter:
    """The shards of one split: each but the last holds exactly ``shard_tokens`` tokens."""

    directory: Path
    prefix: str
    """File names are PREFIX_000000.bin."""
    shard_tokens: int
    dtype: type[np.unsignedinteger[Any]]
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Finished ones: file, tokens, sha256."""
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    _open: ShardWriter | None = None

    def path(self, index: int) -> Path:
        return self.directory / f"{self.prefix}_{index:06}.bin"

    def write(self, part: Tokens) -> None:
        """Append a tokenised run."""
        ids = part.ids
        while len(ids):
            if self._open is None:
                self._open = ShardWriter(self.path(len(self.shards)), self.dtype)
            room = self.shard_tokens - self._open.count
            self._open.write(ids[:room])
            self.tokens += len(ids[:room])
            ids = ids[room:]
            if self._open.count == self.shard_tokens:
                self.finish()
        self.documents += part.documents
        self.bytes += part.bytes

    def sync(self) -> None:
        """Flush what is written to the disk."""
        if self._open is not None:
            self._open.sync()

    def finish(self) -> None:
        """Complete the open shard, if there is one."""
        if self._open is not None:
            self._open.finish()
            entry = {"tokens": self._open.count, "sha256": self._open.sha256}
            self.shards.append({"file": self._open.path.name, **entry})
            self._open = None

    def close(self) -> None:
        if self._open is not None:
            self._open.close()

    def state(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "shards": self.shards,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Return to the state of the journal; what was written after it is removed."""
        self.tokens, self.documents = state["tokens"], state["documents"]
        self.bytes, self.shards = state["bytes"], state["shards"]
        rest = self.tokens - sum(shard["tokens"] for shard in self.shards)
        if rest:
            self._open = ShardWriter(self.path(len(self.shards)), self.dtype, rest)
        first = len(self.shards) + bool(rest)
        for path in [*self.directory.glob(f"{self.prefix}_*.bin"), *self.leftovers()]:
            number = int(path.name.removeprefix(".").removesuffix(".part")[-10:-4])
            if number >= first:
                path.unlink()
        for shard in self.shards:
            if not (self.directory / shard["file"]).is_file():
                raise GptDistError(
                    f"{self.directory / shard['file']}: has been removed; --overwrite starts over"
                )

    def leftovers(self) -> list[Path]:
        """Temporary files of unfinished shards."""
        return list(self.directory.glob(f".{self.prefix}_*.bin.part"))


class DatasetWriter:
    """A data set that is being written.

    Args:
        directory: exists, and is empty or holds the journal of an earlier attempt.
        arguments: what determines the tokens; kept in the journal and in ``dataset.json``.
        tokenizer: saved in the data set at once.
        shard_tokens: tokens in each shard.
        validation: how the validation split is chosen (validation.py).
        journal: of the attempt to resume.

    Raises:
        GptDistError: a shard that the journal names is missing.
        OSError: the directory cannot be written to.
    """

    def __init__(
        self,
        directory: Path,
        arguments: dict[str, Any],
        tokenizer: Tokenizer,
        shard_tokens: int,
        validation: str,
        journal: dict[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.arguments = arguments
        self.validation = validation
        self.tokenizer = tokenizer
        self.cursor = Cursor()
        self.splits: dict[Split, SplitWriter] = {
            split: SplitWriter(
                directory, f"{arguments['source']}_{split}", shard_tokens, tokenizer.token_dtype
            )
            for split in SPLITS
        }
        if journal is None:
            self.commit(self.cursor)  # first: after a kill it tells that the files are ours
            tokenizer.save(directory)
        else:
            index, position, documents = journal["cursor"]
            self.cursor = Cursor(index, Position(*position), documents)
            for split, writer in self.splits.items():
                writer.restore(journal["splits"][split])

    def write(self, parts: list[Tokens]) -> None:
        """Append tokenised runs, in order."""
        for part in parts:
            self.splits[part.split].write(part)

    def commit(self, cursor: Cursor) -> None:
        """Flush all that was read before the cursor to the disk, then record it in the journal."""
        for writer in self.splits.values():
            writer.sync()
        self.cursor = cursor
        journal = {
            "format_version": DATASET_FORMAT_VERSION,
            "arguments": self.arguments,
            "validation": self.validation,
            "cursor": cursor,
            "splits": {split: writer.state() for split, writer in self.splits.items()},
        }
        write_atomically(self.directory / JOURNAL_FILE, json.dumps(journal).encode())

    def finish(self) -> dict[str, Any]:
        """Complete the last shards and write ``dataset.json``; returns its content."""
        for writer in self.splits.values():
            writer.finish()
        tokenizer_sha256 = hashlib.sha256(self.tokenizer.to_json().encode()).hexdigest()
        splits = {split: writer.state() for split, writer in self.splits.items() if writer.shards}
        info = {
            "format_version": DATASET_FORMAT_VERSION,
            "source": self.arguments["source"],
            "tokenizer": {
                "type": self.tokenizer.name,
                "vocab_size": self.tokenizer.vocab_size,
                "eot_id": self.tokenizer.eot_id,
                "sha256": tokenizer_sha256,
            },
            "fingerprint": fingerprint(tokenizer_sha256, splits),
            "splits": splits,
            "validation": self.validation,
            "arguments": self.arguments,
        }
        write_atomically(
            self.directory / DATASET_FILE, (json.dumps(info, indent=2) + "\n").encode()
        )
        remove_journal(self.directory)
        return info

    def close(self) -> None:
        """Stop before the end; the journal tells where to resume."""
        for writer in self.splits.values():
            writer.close()


def fingerprint(tokenizer_sha256: str, splits: dict[Any, dict[str, Any]]) -> str:
    """Identifies tokens and their order: sha256 of the tokenizer's and all shards' checksums."""
    shards = {name: [s["sha256"] for s in splits[name]["shards"]] for name in sorted(splits)}
    return hashlib.sha256(json.dumps([tokenizer_sha256, shards]).encode()).hexdigest()


def read_journal(directory: Path) -> dict[str, Any] | None:
    """The journal of an unfinished data set; None where there is none.

    The remains of an attempt that wrote nothing yet, or of an interrupted removal, are removed.

    Raises:
        GptDistError: the journal is damaged.
    """
    path = directory / JOURNAL_FILE
    try:
        journal = migrated(json.loads(path.read_bytes()))
        version = journal["format_version"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise GptDistError(f"{path}: damaged; --overwrite starts over") from None
    if version != DATASET_FORMAT_VERSION:
        raise GptDistError(f"{path}: written by another version; --overwrite starts over")
    if "cursor" not in journal or not (directory / FILE_NAME).exists():
        remove_data_set(directory)
        return None
    return journal


def remove_journal(directory: Path) -> None:
    """The data set is complete."""
    for name in (JOURNAL_FILE, f".{JOURNAL_FILE}.part", f".{DATASET_FILE}.part"):
        (directory / name).unlink(missing_ok=True)
    sync_directory(directory)


def remove_data_set(directory: Path) -> None:
    """Remove everything that a ``DatasetWriter`` wrote, if it wrote anything here.

    A kill during the removal leaves a journal, so the rest is never taken for a data set.
    """
    if (directory / DATASET_FILE).exists():
        (directory / DATASET_FILE).replace(directory / JOURNAL_FILE)
        sync_directory(directory)
    if not (directory / JOURNAL_FILE).exists():
        return
    patterns = [f"*_{split}_[0-9]*.bin{part}" for split in SPLITS for part in ("", ".part")]
    for pattern in patterns:
        for path in directory.glob(pattern):
            path.unlink()
    for name in (FILE_NAME, DATASET_FILE, JOURNAL_FILE):
        (directory / f".{name}.part").unlink(missing_ok=True)
    (directory / FILE_NAME).unlink(missing_ok=True)
    (directory / JOURNAL_FILE).unlink()
