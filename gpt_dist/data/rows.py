"""Rows that begin where documents begin: documents packed by best fit, cropped where none fits.

A window of the stream (`gpt_dist.data.order`) begins anywhere, so most documents are seen without
their beginning. Here each row starts with the end-of-text token before a document. It takes the
longest document that fits, again and again; where none fits, the shortest one is cropped, and its
rest is never seen (github.com/karpathy/nanochat, "BOS-aligned best fit").

The plan of all rows depends on the data set and the length of a row alone. It is made at first use
and kept beside the shards.
"""

from __future__ import annotations

import fcntl
import io
from bisect import bisect_right, insort
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpt_dist.data.dataset import Dataset
from gpt_dist.data.shards import TokenStream
from gpt_dist.errors import GptDistError
from gpt_dist.files import write_atomically

if TYPE_CHECKING:
    from gpt_dist.text.tokenizers.base import Ids

CHOICE = 1024
"""Documents among which the best fit is sought."""
BLOCK = 1 << 24
"""Tokens that are searched for beginnings of documents at a time."""


class DocumentRows:
    """The rows of one data set; has the interface of a stream whose positions are rows.

    Args:
        dataset: its training split is packed.
        length: tokens of a row.

    Raises:
        GptDistError: the tokenizer has no end-of-text token, or no row can be filled.
    """

    def __init__(self, dataset: Dataset, stream: TokenStream, length: int) -> None:
        eot = dataset.tokenizer.eot_id
        if eot is None:
            raise GptDistError(
                f"data.rows = documents: {dataset.directory} has no end-of-text token between "
                "documents; valid here: stream"
            )
        self.stream, self.length, self.dtype = stream, length, stream.dtype
        name = f"rows-{length}-{dataset.fingerprint[:16]}.npy"
        starts, ends = kept_plan(dataset.directory / name, stream, eot, length)
        self._starts, self._ends = starts, ends
        if not len(self):
            raise GptDistError(
                f"{dataset.directory}: its documents do not fill one row of "
                f"model.context_length + 1 = {length} tokens"
            )

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1]) // self.length if len(self._ends) else 0

    @property
    def share(self) -> float:
        """Share of the stream's tokens that are in a row; the others were cropped."""
        return len(self) * self.length / len(self.stream)

    def read(self, start: int, count: int) -> Ids:
        """``count`` tokens of the stream below, as `TokenStream.read`."""
        return self.stream.read(start, count)

    def gather(self, rows: NDArray[np.int64], length: int) -> Ids:
        """The tokens of the given rows, shape (n, length); ``length`` is that of all rows."""
        tokens = np.empty((len(rows), length), dtype=self.dtype)
        first = np.searchsorted(self._ends, rows * length, side="right")
        last = np.searchsorted(self._ends, (rows + 1) * length)
        for row, number, *pieces in zip(tokens, rows.tolist(), first, last, strict=True):
            done = 0
            for piece in range(pieces[0], pieces[1] + 1):
                end = int(self._ends[piece]) - number * length
                row[done:end] = self.stream.read(int(self._starts[piece]), end - done)
                done = end
        return tokens


def kept_plan(
    path: Path, stream: TokenStream, eot: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The plan in a file, which is made if it is not there and the directory can be written.

    Returns:
        As `plan_rows`.
    """
    with building(path.with_name(f".{path.name}.lock")):
        with suppress(OSError, ValueError, EOFError):  # missing, or not whole
            starts, ends = np.load(path, mmap_mode="r", allow_pickle=False)
            return starts, ends
        plan = np.stack(plan_rows(document_starts(stream, eot), len(stream), length))
        buffer = io.BytesIO()
        np.save(buffer, plan)
        with suppress(OSError):  # of a read-only data set every process makes its own
            write_atomically(path, buffer.getvalue())
    return plan[0], plan[1]


@contextmanager
def building(lock: Path) -> Iterator[None]:
    """Let one process at a time make the plan: the ranks of a host ask for it at once."""
    try:
        file = lock.open("wb")
    except OSError:  # a read-only data set
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        lock.unlink(missing_ok=True)


def document_starts(stream: TokenStream, eot: int) -> NDArray[np.int64]:
    """Where documents begin: the positions of the end-of-text tokens, which come before them."""
    found = [
        np.flatnonzero(stream.read(at, min(BLOCK, len(stream) - at)) == eot) + at
        for at in range(0, len(stream), BLOCK)
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])


def plan_rows(
    starts: NDArray[np.int64], tokens: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack documents into rows of ``length`` tokens.

    Args:
        starts: first token of each document, ascending.
        tokens: length of the stream.
        length: tokens of a row.

    Returns:
        Of each piece of a document, in the order of the rows: its first token in the stream, and
        where it ends if all rows are laid end to end. The last row is full.
    """
    sizes = np.diff(starts, append=tokens).tolist()
    waiting = iter(zip(sizes, range(len(sizes)), strict=True))
    choice = sorted(document for _, document in zip(range(CHOICE), waiting, strict=False))
    pieces: list[int] = []
    ends: list[int] = []
    end, whole, room = 0, 0, length
    while choice:
        # The longest that fits, of equal ones the last; else the shortest, cropped.
        size, document = choice.pop(max(0, bisect_right(choice, (room, len(sizes))) - 1))
        size = min(size, room)
        end, room = end + size, room - size
        pieces.append(document)
        ends.append(end)
        if not room:
            whole, room = len(pieces), length
        if (following := next(waiting, None)) is not None:
            insort(choice, following)
    return starts[pieces[:whole]], np.array(ends[:whole], np.int64)
