"""Token shards: llm.c's ``.bin`` files, and many of them as one stream of tokens.

    stream = TokenStream(["x_train_000000.bin", "x_train_000001.bin"], vocab_size=50257)
    windows = stream.gather(np.array([0, 1000]), 257)    # (2, 257)

A shard is a header of 256 little-endian int32 (magic, version, number of tokens, zeros) and then
the tokens (karpathy/llm.c, dev/data/data_common.py). Vocabularies of up to 65,536 tokens are stored
as uint16 (magic 20240520, version 1, llm.c's "gpt-2"), larger ones as uint32 (magic 20240801,
version 7, "llama-3").
"""

from __future__ import annotations

import hashlib
import mmap
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from gpt_dist.errors import GptDistError
from gpt_dist.files import naming, sync_directory

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from gpt_dist.text.tokenizers.base import Ids

HEADER_BYTES = 1024
FORMATS: dict[np.dtype[Any], tuple[int, int]] = {
    np.dtype("<u2"): (20240520, 1),
    np.dtype("<u4"): (20240801, 7),
}
"""Type of the tokens → magic number and version in the header."""


class ShardWriter:
    """Write one shard; it appears under its name only when it is complete and on the disk.

    Use it as a context manager: a normal exit finishes the shard, an exception removes what was
    written. Or leave it unfinished (``sync``, ``close``) and resume it later:
    ``ShardWriter(path, dtype, resume=count)``.

    Args:
        path: the shard's final name.
        dtype: of the tokens, uint16 or uint32.
        resume: keep this many tokens of an unfinished (or finished) shard and continue after them.

    Raises:
        GptDistError: the shard to resume is missing or shorter than that.
        OSError: with the file's name.
    """

    def __init__(
        self, path: str | os.PathLike[str], dtype: DTypeLike = np.uint16, resume: int = 0
    ) -> None:
        self.path = Path(path)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._temporary = self.path.with_name(f".{self.path.name}.part")
        self.count = resume
        self.sha256 = ""
        """Of the finished file."""
        if resume:
            if self.path.exists():
                self.path.replace(self._temporary)
            size = HEADER_BYTES + self.dtype.itemsize * resume
            if not self._temporary.exists() or self._temporary.stat().st_size < size:
                raise GptDistError(f"{self._temporary}: missing or shorter than {size:,} bytes")
            self._file = self._temporary.open("r+b")
            self._file.truncate(size)
            self._file.seek(size)
        else:
            self._file = self._temporary.open("w+b")
            self._file.write(_header(self.dtype, 0))

    def write(self, tokens: Ids) -> None:
        """Append tokens, shape (n,)."""
        with naming(self.path):
            self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
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
            self._file.write(_header(self.dtype, self.count))
            self._file.seek(0)
            self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self.path)
            sync_directory(self.path.parent)

    def close(self) -> None:
        """Leave the shard unfinished, to be resumed."""
        with suppress(OSError):  # a full disk cannot take the last buffered bytes
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


def write_shard(path: str | os.PathLike[str], tokens: Ids) -> str:
    """Write one shard of tokens, shape (n,) uint16 or uint32; returns the sha256 of the file."""
    with ShardWriter(path, tokens.dtype) as writer:
        writer.write(tokens)
    return writer.sha256


def _header(dtype: np.dtype[Any], count: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = *FORMATS[dtype], count
    return header.tobytes()


def read_shard(path: str | os.PathLike[str]) -> Ids:
    """The tokens of one shard, shape (n,) uint16 or uint32, memory-mapped and read-only.

    Raises:
        GptDistError: missing, not a shard, truncated, or of a size that its header denies.
    """
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = np.frombuffer(file.read(min(HEADER_BYTES, size // 4 * 4)), dtype="<i4")
            known = {magic: (dtype, version) for dtype, (magic, version) in FORMATS.items()}
            if len(header) < 3 or int(header[0]) not in known:
                found = f"magic {header[0]}" if len(header) else "an empty file"
                magics = " or ".join(map(str, known))
                raise GptDistError(f"{path}: not a token shard: {found}, expected magic {magics}")
            dtype, version = known[int(header[0])]
            if header[1] != version:
                raise GptDistError(f"{path}: shard version {header[1]}, expected {version}")
            count = int(header[2])
            expected = HEADER_BYTES + dtype.itemsize * count
            if count < 0 or size != expected:
                what = "truncated" if size < expected else "not what its header says"
                raise GptDistError(
                    f"{path}: {what}: {size:,} bytes, but {count:,} tokens make {expected:,}"
                )
            if count == 0:
                return np.empty(0, dtype=dtype)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise GptDistError(f"{path}: {error.strerror}") from None
    return np.frombuffer(mapped, dtype=dtype, offset=HEADER_BYTES)


def check_ids(ids: Ids, vocab_size: int | None, where: str = "tokens") -> None:
    """Refuse token ids beyond the vocabulary; cheap enough for every batch.

    Raises:
        GptDistError: naming ``where``, the first such id and its index in ``ids``.
    """
    if vocab_size is not None and ids.size and int(ids.max()) >= vocab_size:
        index = int(np.flatnonzero(ids >= vocab_size)[0])
        raise GptDistError(
            f"{where}: token {index} has the id {ids.flat[index]}, beyond the vocabulary "
            f"(ids 0 to {vocab_size - 1}); was the data made with another tokenizer?"
        )


class TokenStream:
    """The shards of one split as one memory-mapped stream of tokens.

    Args:
        paths: shard files, in order.
        vocab_size: each read is checked for ids beyond it; None = no check.

    Raises:
        GptDistError: a shard is missing or damaged.
    """

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], vocab_size: int | None = None
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.vocab_size = vocab_size
        _allow_open_files(len(self.paths))
        self._shards = [read_shard(path) for path in self.paths]
        self.dtype = np.result_type(np.uint16, *self._shards)
        """Of all that is read: uint32 if any shard is."""
        self._views: dict[tuple[int, int], Ids] = {}
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> Ids:
        """``count`` tokens of the stream from position ``start``, shape (count,).

        Raises:
            IndexError: the range is outside the stream.
            GptDistError: a token id beyond the vocabulary; the shard and position are named.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of a stream of {len(self)}")
        tokens = np.empty(count, dtype=self.dtype)
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

    def gather(self, starts: NDArray[np.int64], length: int) -> Ids:
        """Windows of the stream; a window may span shards.

        Args:
            starts: first token of each window, shape (n,).
            length: tokens in each window.

        Returns:
            The windows, shape (n, length).

        Raises:
            IndexError: a window reaches outside the stream.
            GptDistError: a token id beyond the vocabulary; the shard and position are named.
        """
        windows: Ids = np.empty((len(starts), length), dtype=self.dtype)
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
        if self.vocab_size is not None and int(windows.max()) >= self.vocab_size:
            bad = int(np.flatnonzero((windows >= self.vocab_size).any(axis=1))[0])
            self.read(int(starts[bad]), length)  # raises and names the shard and the position
        return windows

    def _view(self, shard: int, length: int) -> Ids:
        """All windows of one shard as a view, shape (tokens - length + 1, length)."""
        view = self._views.get((shard, length))
        if view is None:
            view = self._views[shard, length] = sliding_window_view(self._shards[shard], length)
        return view


def _allow_open_files(count: int) -> None:
    """Raise the soft limit, usually 1024: each mapped file keeps a file descriptor open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if count > soft // 2 and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
