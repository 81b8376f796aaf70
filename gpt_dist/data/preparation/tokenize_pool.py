"""Tokenise a stream of pieces on all cores, in order, with bounded memory.

Threads are enough: tiktoken and Hugging Face tokenizers release Python's lock, and all threads
share one vocabulary. A chunk of many documents is one call into the tokenizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gpt_dist.data.dataset import Split
from gpt_dist.data.preparation.documents import START, Piece, Position
from gpt_dist.text.cuts import Cut, gpt2_cut

if TYPE_CHECKING:
    from gpt_dist.text.tokenizers import Tokenizer
    from gpt_dist.text.tokenizers.base import Ids

CHUNK_CHARACTERS = 1 << 19


class Input(Protocol):
    """A file, or anything else that documents are read from."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def split(self) -> Split | None:
        """Where its documents go; None: chosen document by document."""

    @property
    def size(self) -> int:
        """Weight of this input in the progress bar, such as its bytes."""

    def read(self, at: Position, cut: Cut) -> Iterator[Piece]:
        """The documents from a position on; long ones in pieces, cut where ``cut`` allows it."""

    def prefetch(self) -> None:
        """Begin to download this input; it is read next."""


class Cursor(NamedTuple):
    """Where reading of all inputs resumes."""

    input: int = 0
    position: Position = START
    documents: int = 0
    """Documents begun so far."""


@dataclass
class Run:
    """Consecutive texts of one split."""

    split: Split
    texts: list[str] = field(default_factory=list)
    starts: list[bool] = field(default_factory=list)


@dataclass
class Chunk:
    """Work for one thread: runs of texts, and where reading resumes after them."""

    runs: list[Run]
    after: Cursor | None
    """None where reading cannot resume here."""
    done: float
    """Share of all inputs read so far, 0 to 1."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised run."""

    split: Split
    ids: Ids
    documents: int
    bytes: int
    """Length of the text in UTF-8."""


def read_chunks(
    inputs: Sequence[Input], at: Cursor, choose: Callable[[int], Split], cut: Cut = gpt2_cut
) -> Iterator[Chunk]:
    """Read inputs one after the other, in chunks of about half a million characters.

    Args:
        at: where to begin.
        choose: the split of the document with a given index, for inputs that do not set it.
        cut: where the tokenizer lets a long document be cut.
    """
    documents = at.documents
    total = sum(source.size for source in inputs) or 1
    before = sum(source.size for source in inputs[: at.input])
    runs: list[Run] = []
    characters = 0
    after, done = None, 0.0
    for index in range(at.input, len(inputs)):
        source = inputs[index]
        if index + 1 < len(inputs):
            inputs[index + 1].prefetch()
        for piece in source.read(at.position if index == at.input else START, cut):
            documents += piece.starts
            split = source.split or choose(documents - 1)
            if not runs or runs[-1].split != split:
                runs.append(Run(split))
            runs[-1].texts.append(piece.text)
            runs[-1].starts.append(piece.starts)
            characters += len(piece.text)
            after = Cursor(index, piece.next, documents) if piece.next else None
            done = (before + source.size * piece.done) / total
            if characters >= CHUNK_CHARACTERS:
                yield Chunk(runs, after, done)
                runs, characters = [], 0
        before += source.size
    if runs:
        yield Chunk(runs, after, done)


def tokenize(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Chunk, list[Tokens]]]:
    """Tokenise chunks on ``workers`` threads; results come in the order of the chunks.

    Raises:
        UsageError: a text has a character that the tokenizer cannot express.
    """

    def work(chunk: Chunk) -> list[Tokens]:
        return [
            Tokens(
                run.split,
                tokenizer.encode_documents(run.texts, run.starts),
                sum(run.starts),
                sum(len(text.encode()) for text in run.texts),
            )
            for run in chunk.runs
        ]

    pool = ThreadPoolExecutor(workers)
    pending: deque[tuple[Chunk, Future[list[Tokens]]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(work, chunk)))
            # A few more chunks than threads, so that no thread waits for the reader.
            if len(pending) > 2 * workers + 2:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def split_chooser(val_fraction: float, seed: int) -> Callable[[int], Split]:
    """Choose the split of a document by a hash of its index, which needs no second pass.

    The first document always goes to training. With a validation split, the second goes there, so
    that even a few documents fill both.
    """
    threshold = int(val_fraction * 2**64)

    def choose(index: int) -> Split:
        if threshold == 0 or index == 0:
            return "train"
        return "val" if index == 1 or _mix(index + (seed << 32)) < threshold else "train"

    return choose


def _mix(value: int) -> int:
    """SplitMix64 (Steele, Lea and Flood 2014): 64 well-mixed bits of an integer."""
    mask = 2**64 - 1
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
