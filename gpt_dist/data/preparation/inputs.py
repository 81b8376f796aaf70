"""What documents are read from: files, here or to be downloaded, and streams of the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_dist.data.dataset import Split
from gpt_dist.data.preparation.documents import ByteWindow, Piece, Position
from gpt_dist.data.preparation.downloads import RemoteFile, Report
from gpt_dist.data.preparation.readers import (
    TextMode,
    read_hub,
    read_jsonl,
    read_parquet,
    read_text,
)
from gpt_dist.text.cuts import Cut

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_REACH = 1 << 16
"""Bytes from the wanted place within which a file is split at a boundary."""
BOUNDARIES = (rb"\n(\r?\n)+", rb"\n", rb"[ \t]")
"""Of paragraphs, lines and words, the best first."""

Reader = Callable[[Path, Position, Cut], Iterator[Piece]]


@dataclass
class FileInput:
    """A file, local or to be downloaded.

    Attributes:
        file: a path, or what to download.
        reader: yields the documents of the file.
        split: where its documents go; None: chosen document by document.
        downloads: where downloads are kept.
        report: is called with lines on the progress of a download.
    """

    file: Path | RemoteFile
    reader: Reader
    split: Split | None = None
    downloads: Path = Path()
    report: Report = lambda text: None
    _fetching: Future[Path] | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        return self.file.name if isinstance(self.file, RemoteFile) else str(self.file)

    @property
    def size(self) -> int:
        if isinstance(self.file, RemoteFile):
            return self.file.size or 1
        return self.file.stat().st_size

    def path(self) -> Path:
        """The file on disk, downloaded unless it is there.

        Raises:
            GptDistError: the download failed.
        """
        if isinstance(self.file, Path):
            return self.file
        self.prefetch()
        assert self._fetching is not None
        return self._fetching.result()

    def prefetch(self) -> None:
        if isinstance(self.file, RemoteFile) and self._fetching is None:
            pool = ThreadPoolExecutor(1)
            self._fetching = pool.submit(self.file.fetch, self.downloads, self.report)
            pool.shutdown(wait=False)

    def read(self, at: Position, cut: Cut) -> Iterator[Piece]:
        return self.reader(self.path(), at, cut)


@dataclass(frozen=True)
class HubInput:
    """A data set of the hub, streamed by the ``datasets`` library."""

    name: str
    rows: Any
    field: str
    total: int | None
    split: Split | None = None
    size: int = 1

    def read(self, at: Position, cut: Cut) -> Iterator[Piece]:
        return read_hub(self.rows, self.name, self.field, self.total, at, cut)

    def prefetch(self) -> None:
        pass


def text_reader(mode: TextMode, start: int = 0, end: int | None = None) -> Reader:
    return lambda path, at, cut: read_text(path, mode, at, start, end, cut)


def jsonl_reader(field: str) -> Reader:
    return lambda path, at, cut: read_jsonl(path, field, at, cut)


def parquet_reader(column: str) -> Reader:
    return lambda path, at, cut: read_parquet(path, column, at, cut)


def split_by_characters(whole: FileInput, val_fraction: float) -> list[FileInput]:
    """One file as two inputs: the first characters for training, the last for validation.

    As in nanoGPT: the first ``int(n * (1 - val_fraction))`` of n characters.

    Raises:
        GptDistError: the file cannot be downloaded or read.
    """
    return _parts(whole, _character_cut(whole.path(), val_fraction)[0])


def split_at_line(whole: FileInput, val_fraction: float) -> list[FileInput]:
    """As `split_by_characters`, but between two paragraphs, lines or words where that is near.

    So the part for validation may be up to a quarter larger or smaller.

    Raises:
        GptDistError: the file cannot be downloaded or read.
    """
    path = whole.path()
    cut, rest = _character_cut(path, val_fraction)
    if not cut:  # too short: all of it is for training
        return _parts(whole, None)
    reach = min(rest // 4, MAX_REACH)
    start = max(0, cut - reach)
    with closing(ByteWindow(path, start, cut + reach)) as window:
        while window.grow():
            pass
        near = window.bytes(len(window))
    for separator in BOUNDARIES:
        ends = [start + match.end() for match in re.finditer(separator, near)]
        if ends:
            return _parts(whole, min(ends, key=lambda end: abs(end - cut)))
    return _parts(whole, cut)


def _parts(whole: FileInput, cut: int | None) -> list[FileInput]:
    """The file up to a byte for training and the rest for validation; None: all for training."""

    def part(split: Split, start: int, end: int | None) -> FileInput:
        return replace(whole, reader=text_reader("files", start, end), split=split)

    return [part("train", 0, cut), *([part("val", cut, None)] if cut is not None else [])]


def _character_cut(path: Path, val_fraction: float) -> tuple[int | None, int]:
    """Where the last share of a file begins, in bytes, and the characters of that share."""
    characters = sum(len(begins) for _, begins in _character_begins(path))
    wanted = int(characters * (1 - val_fraction))
    before = 0
    for position, begins in _character_begins(path):
        if wanted < before + len(begins):
            return position + int(begins[wanted - before]), characters - wanted
        before += len(begins)
    return None, 0


def _character_begins(path: Path) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Blocks of a file: their offset, and where characters begin in them."""
    import numpy as np

    with closing(ByteWindow(path)) as window:
        while window.grow():
            data = np.frombuffer(window.bytes(len(window)), dtype=np.uint8)
            yield window.position, np.flatnonzero((data & 0xC0) != 0x80)
            window.take(len(window))
