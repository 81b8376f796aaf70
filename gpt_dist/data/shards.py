"""Token shards: llm.c's ``.bin`` files, and the directory of them that makes a data set.

    dataset = open_dataset("data/shakespeare")
    train = dataset.split("train")
    windows = train.gather(np.array([0, 1000]), 257)    # (2, 257) uint16

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) and then
the tokens as uint16 (karpathy/llm.c, dev/data/data_common.py). ``dataset.json`` beside the shards
names the tokenizer and the checksums; without it, llm.c's own shards work as they are.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from gpt_dist.data.catalog import prepare_command
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.files import naming, sync_directory
from gpt_dist.text.tokenizers import FILE_NAME, MAX_VOCAB_SIZE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
TOKEN = np.dtype("<u2")
DATASET_FILE = "dataset.json"
JOURNAL_FILE = "prepare.journal"
"""Where a data set is still being written: finished shards so far (see prepare.py)."""
DATASET_FORMAT_VERSION = 1

Split = Literal["train", "val"]


class ShardWriter:
    """Write one shard; it appears under its name only when it is complete and on the disk.

    Use as a context manager: leaving it normally finishes the shard, leaving it by an exception
    removes what was written. Or keep an unfinished one (``sync``, ``close``) and go on with it
    later: ``ShardWriter(path, resume=count)``.

    Args:
        path: the shard's final name.
        resume: go on after this many tokens of an unfinished (or finished) shard.

    Raises:
        GptDistError: the shard to go on with is missing or shorter than that.
        OSError: naming the file.
    """

    def __init__(self, path: str | os.PathLike[str], resume: int = 0) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.part")
        self.count = resume
        self.sha256 = ""
        """Of the finished file."""
        if resume:
            if self.path.exists():
                self.path.replace(self._temporary)
            size = HEADER_BYTES + TOKEN.itemsize * resume
            if not self._temporary.exists() or self._temporary.stat().st_size < size:
                raise GptDistError(f"{self._temporary}: missing or shorter than {size:,} bytes")
            self._file = self._temporary.open("r+b")
            self._file.truncate(size)
            self._file.seek(size)
        else:
            self._file = self._temporary.open("w+b")
            self._file.write(_header(0))

    def write(self, tokens: NDArray[np.uint16]) -> None:
        """Append tokens, shape (n,)."""
        with naming(self.path):
            self._file.write(np.ascontiguousarray(tokens, dtype=TOKEN).data)
        self.count += len(tokens)

    def sync(self) -> None:
        """Flush what is written so far to the disk."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Complete the header, flush to the disk, and rename into place."""
        with naming(self.path):
            self._file.seek(0)
            self._file.write(_header(self.count))
            self._file.seek(0)
            self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self.path)
            sync_directory(self.path.parent)

    def close(self) -> None:
        """Leave the shard unfinished, for ``resume``."""
        with suppress(OSError):  # a full disk refuses the last buffered bytes
            self._file.close()

    def discard(self) -> None:
        """Remove what was written."""
        self.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.finish()
        except BaseException:
            self.discard()
            raise


def write_shard(path: str | os.PathLike[str], tokens: NDArray[np.uint16]) -> str:
    """Write one shard of tokens, shape (n,); returns the sha256 of the file."""
    with ShardWriter(path) as writer:
        writer.write(tokens)
    return writer.sha256


def _header(count: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, count
    return header.tobytes()


def read_shard(path: str | os.PathLike[str]) -> NDArray[np.uint16]:
    """The tokens of one shard, shape (n,), memory-mapped and read-only.

    Raises:
        GptDistError: missing, not a shard, truncated, or of a size that its header denies.
    """
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = np.frombuffer(file.read(min(HEADER_BYTES, size // 4 * 4)), dtype="<i4")
            if len(header) < 3 or header[0] != MAGIC:
                found = f"magic {header[0]}" if len(header) else "an empty file"
                raise GptDistError(f"{path}: not a token shard: {found}, expected magic {MAGIC}")
            if header[1] != VERSION:
                raise GptDistError(f"{path}: shard version {header[1]}, expected {VERSION}")
            count = int(header[2])
            expected = HEADER_BYTES + TOKEN.itemsize * count
            if count < 0 or size != expected:
                what = "truncated" if size < expected else "not what its header says"
                raise GptDistError(
                    f"{path}: {what}: {size:,} bytes, but {count:,} tokens make {expected:,}"
                )
            if count == 0:
                return np.empty(0, dtype=TOKEN)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise GptDistError(f"{path}: {error.strerror}") from None
    return np.frombuffer(mapped, dtype=TOKEN, offset=HEADER_BYTES)


def check_ids(ids: NDArray[np.uint16], vocab_size: int, where: str = "tokens") -> None:
    """Refuse token ids beyond the vocabulary; cheap enough for every batch.

    Raises:
        GptDistError: naming ``where``, the first such id and its index in ``ids``.
    """
    if vocab_size < MAX_VOCAB_SIZE and ids.size and int(ids.max()) >= vocab_size:
        index = int(np.flatnonzero(ids >= vocab_size)[0])
        raise GptDistError(
            f"{where}: token {index} has the id {ids.flat[index]}, beyond the vocabulary "
            f"(ids 0 to {vocab_size - 1}); was the data made with another tokenizer?"
        )


class TokenStream:
    """The shards of one split as one memory-mapped stream of tokens.

    Args:
        paths: shard files, in order.
        vocab_size: ids that are valid; each read is checked against it.

    Raises:
        GptDistError: a shard is missing or damaged.
    """

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], vocab_size: int = MAX_VOCAB_SIZE
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.vocab_size = vocab_size
        _allow_open_files(len(self.paths))
        self._shards = [read_shard(path) for path in self.paths]
        self._views: dict[tuple[int, int], NDArray[np.uint16]] = {}
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> NDArray[np.uint16]:
        """Tokens start … start + count of the stream, shape (count,).

        Raises:
            IndexError: outside of the stream.
            GptDistError: a token id beyond the vocabulary; the shard and position are named.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of a stream of {len(self)}")
        tokens = np.empty(count, dtype=TOKEN)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < count:
            data = self._shards[shard]
            offset = start + done - (int(self._ends[shard]) - len(data))
            piece = data[offset : offset + count - done]
            check_ids(piece, self.vocab_size, f"{self.paths[shard]}, from token {offset:,}")
            tokens[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return tokens

    def gather(self, starts: NDArray[np.int64], length: int) -> NDArray[np.uint16]:
        """Windows of the stream; they may cross from one shard into the next.

        Args:
            starts: first token of each window, shape (n,).
            length: tokens in each window.

        Returns:
            The windows, shape (n, length).

        Raises:
            IndexError: a window reaches outside of the stream.
            GptDistError: a token id beyond the vocabulary; the shard and position are named.
        """
        windows: NDArray[np.uint16] = np.empty((len(starts), length), dtype=TOKEN)
        if windows.size == 0:
            return windows
        if starts.min() < 0 or starts.max() + length > len(self):
            raise IndexError(
                f"windows of {length} from {starts.min()} to {starts.max()} "
                f"of a stream of {len(self)}"
            )
        if len(self._shards) == 1:
            windows = self._view(0, length)[starts]
        else:
            shards = np.searchsorted(self._ends, starts, side="right")
            crossing = starts + length > self._ends[shards]
            for shard in np.unique(shards[~crossing]):
                rows = np.flatnonzero((shards == shard) & ~crossing)
                first = self._ends[shard] - len(self._shards[shard])
                windows[rows] = self._view(int(shard), length)[starts[rows] - first]
            for row in np.flatnonzero(crossing):
                windows[row] = self.read(int(starts[row]), length)
        if self.vocab_size < MAX_VOCAB_SIZE and int(windows.max()) >= self.vocab_size:
            bad = int(np.flatnonzero((windows >= self.vocab_size).any(axis=1))[0])
            self.read(int(starts[bad]), length)  # raises, naming shard and position
        return windows

    def _view(self, shard: int, length: int) -> NDArray[np.uint16]:
        """All windows of one shard, (tokens - length + 1, length), without a copy."""
        view = self._views.get((shard, length))
        if view is None:
            view = np.lib.stride_tricks.sliding_window_view(self._shards[shard], length)
            self._views[shard, length] = view
        return view


def _allow_open_files(count: int) -> None:
    """Each mapped file keeps a file descriptor open; the usual soft limit is 1024 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if count > soft // 2 and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: shards, their tokenizer and what is known about them."""

    directory: Path
    tokenizer: Tokenizer
    info: dict[str, Any]
    """``dataset.json``; empty for shards that have none."""
    shards: dict[str, list[Path]]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the tokens and their order: equal for equal data, wherever it lies."""
        if self.info:
            return str(self.info["fingerprint"])
        digest = hashlib.sha256(self.tokenizer.to_json().encode())
        for split, paths in sorted(self.shards.items()):
            for path in paths:
                with path.open("rb") as file:
                    digest.update(split.encode() + file.read(HEADER_BYTES))
                digest.update(path.stat().st_size.to_bytes(8, "little"))
        return digest.hexdigest()

    def split(self, name: Split) -> TokenStream | None:
        """The token stream of ``train`` or ``val``; None where the data set has no such split.

        Raises:
            GptDistError: a shard is missing or damaged.
        """
        paths = self.shards.get(name)
        return TokenStream(paths, self.tokenizer.vocab_size) if paths else None


def open_split(directory: str | os.PathLike[str], name: Split) -> TokenStream:
    """The token stream of one split of a data set.

    Raises:
        UsageError: no data set there.
        GptDistError: the data set has no such split, or a shard is missing or damaged.
    """
    stream = open_dataset(directory).split(name)
    if stream is None:
        raise GptDistError(f"{directory}: has no {name} shards (*_{name}*.bin)")
    return stream


def open_dataset(directory: str | os.PathLike[str], tokenizer_name: str = "gpt2") -> Dataset:
    """Open a directory of token shards.

    Args:
        tokenizer_name: tokenizer of shards without ``dataset.json`` (which wins where it is).

    Raises:
        UsageError: no data there, with the command that makes it.
        GptDistError: an unfinished or damaged data set.
    """
    directory = Path(directory)
    if (directory / DATASET_FILE).exists():
        info = read_dataset_file(directory)
        shards = {
            split: [directory / shard["file"] for shard in entry["shards"]]
            for split, entry in info["splits"].items()
        }
        for split, entry in info["splits"].items():
            for path, shard in zip(shards[split], entry["shards"], strict=True):
                if len(read_shard(path)) != shard["tokens"]:
                    raise GptDistError(
                        f"{path}: holds {len(read_shard(path)):,} tokens, but {DATASET_FILE} "
                        f"says {shard['tokens']:,}"
                    )
        return Dataset(directory, load_tokenizer(directory / FILE_NAME), info, shards)
    if (directory / JOURNAL_FILE).exists():
        raise GptDistError(
            f"{directory}: not finished (no {DATASET_FILE}); run the same prepare command again "
            "and it goes on where it stopped"
        )
    shards = {"train": [], "val": []}
    for path in sorted(directory.glob("*.bin")):
        # In names as my_val_train_000.bin the last word counts.
        train, val = path.name.rfind("_train"), path.name.rfind("_val")
        if train >= 0 or val >= 0:
            shards["train" if train > val else "val"].append(path)
    if not shards["train"] and not shards["val"]:
        raise UsageError(f"{directory}: no data there; make it with: {prepare_command(directory)}")
    return Dataset(directory, load_tokenizer(tokenizer_name), {}, shards)


def read_dataset_file(directory: Path) -> dict[str, Any]:
    """``dataset.json`` of a data set.

    Raises:
        GptDistError: damaged, or of another format version.
    """
    path = directory / DATASET_FILE
    try:
        info: dict[str, Any] = json.loads(path.read_bytes())
        version = info["format_version"]
        complete = all(
            isinstance(shard["file"], str) and isinstance(shard["tokens"], int)
            for split in info["splits"].values()
            for shard in split["shards"]
        )
        complete = complete and isinstance(info["fingerprint"], str)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise GptDistError(f"{path}: damaged; prepare the data set again") from None
    if version != DATASET_FORMAT_VERSION or not complete:
        raise GptDistError(
            f"{path}: format_version {version!r}; this version reads {DATASET_FORMAT_VERSION}"
        )
    return info
