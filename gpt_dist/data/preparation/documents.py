"""Documents from files, as a stream of pieces of bounded size.

Long documents are cut only where the cut does not change the token ids. Memory stays bounded, and
the ids are those of the whole document.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from gpt_dist.errors import GptDistError
from gpt_dist.text.cuts import Cut

PIECE_BYTES = 1 << 18
"""About the longest piece, where the text allows a cut; also the amount read at a time."""
MAX_RUN = 1 << 24
"""Longest text without a place to cut that is accepted."""
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}


class Position(NamedTuple):
    """Where reading resumes: a byte or row of a file, perhaps inside a document."""

    offset: int = 0
    inside: bool = False


START = Position()


class Piece(NamedTuple):
    """A document, or a part of one."""

    text: str
    starts: bool
    """Begins a document."""
    next: Position | None
    """Where reading resumes after this piece; None where it cannot."""
    done: float
    """Share of the file that has been read, 0 to 1."""


# --- long documents -------------------------------------------------------------------------------


def cut_text(text: str, name: str, cut: Cut) -> Iterator[str]:
    """A document in pieces; joined they are the document.

    Raises:
        GptDistError: the text is too long, and nowhere can it be cut.
    """
    start, size = 0, PIECE_BYTES
    while len(text) - start > size:
        length = cut(text[start : start + size + 1], size)
        if length:
            yield text[start : start + length]
            start, size = start + length, PIECE_BYTES
        else:
            size = longer(size, name)
    yield text[start:]


def longer(size: int, name: str) -> int:
    """Twice the size, to look for a place to cut in more text.

    Raises:
        GptDistError: ``MAX_RUN`` is reached.
    """
    if size >= MAX_RUN:
        raise GptDistError(
            f"{name}: more than {MAX_RUN:,} characters without a space, line end or other place "
            "where this tokenizer lets a text be cut; is this text?"
        )
    return 2 * size


def clean(text: str) -> str:
    """The text with lone surrogates (which JSON can hold) replaced, as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def whole_document(text: str, name: str, cut: Cut, following: int, done: float) -> Iterator[Piece]:
    """A document that is in memory, in pieces; reading can resume only after the last one.

    Args:
        cut: where the tokenizer lets a text be cut.
        following: offset of the next document.
        done: share of the file that has been read.
    """
    if not text or text.isspace():
        return
    starts, previous = True, None
    for piece in cut_text(clean(text), name, cut):
        if previous is not None:
            yield Piece(previous, starts, None, done)
            starts = False
        previous = piece
    if previous is not None:
        yield Piece(previous, starts, Position(following), done)


# --- files of bytes ------------------------------------------------------------------------------


class ByteWindow:
    """The part of a file that is in memory: it grows at its end and is consumed at its front.

    Files whose names end in .gz, .bz2, .zst or .lz4 are decompressed.

    Args:
        start, end: the part of the (decompressed) file to read, in bytes; end None = all.

    Raises:
        GptDistError: the file cannot be read or decompressed.
    """

    def __init__(self, path: Path, start: int = 0, end: int | None = None) -> None:
        self.path = path
        self.position = start
        """Offset of the window's first byte in the (decompressed) file."""
        self._data, self._begin, self._scanned = b"", 0, 0
        self._end = end
        self._compression = COMPRESSED.get(path.suffix.lower())
        try:
            self._size = path.stat().st_size
            self._raw: IO[bytes] = path.open("rb")
            self._file: IO[bytes] = self._raw
            if self._compression:
                import pyarrow as pa

                self._file = pa.input_stream(self._raw, compression=self._compression)
                while start and (block := self._file.read(min(start, 1 << 22))):
                    start -= len(block)
            else:
                self._file.seek(start)
        except OSError as error:
            raise self._unreadable(error) from None

    def __len__(self) -> int:
        return len(self._data) - self._begin

    def grow(self) -> bool:
        """Read more; False at the end of the file."""
        count = max(PIECE_BYTES, len(self))
        if self._end is not None:
            count = min(count, self._end - self.position - len(self))
        try:
            block = self._file.read(count)
        except OSError as error:
            raise self._unreadable(error) from None
        self._data = self._data[self._begin :] + block
        self._scanned -= self._begin
        self._begin = 0
        return bool(block)

    def find(self, separator: bytes) -> int:
        """Bytes before the first separator; -1 where the window has none."""
        found = self._data.find(separator, max(self._begin, self._scanned))
        self._scanned = len(self._data) - len(separator) + 1  # one may begin in the last bytes
        return found - self._begin if found >= 0 else -1

    def rfind(self, separator: bytes) -> int:
        """Bytes before the last separator; -1 where the window has none."""
        found = self._data.rfind(separator, self._begin)
        return found - self._begin if found >= 0 else -1

    def take(self, count: int) -> None:
        """Drop the first ``count`` bytes."""
        self._begin += count
        self._scanned = self._begin
        self.position += count

    def bytes(self, count: int) -> bytes:
        """The first ``count`` bytes."""
        return self._data[self._begin : self._begin + count]

    def text(self, count: int, partial: bool = False) -> str:
        """The first ``count`` bytes as text; ``partial`` leaves out an incomplete last character.

        Raises:
            GptDistError: not UTF-8; names the byte's position in the file.
        """
        data = self.bytes(count)
        try:
            return (
                codecs.getincrementaldecoder("utf-8")().decode(data) if partial else data.decode()
            )
        except UnicodeDecodeError as error:
            guess = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
            unpacked = " of the decompressed file" if self._compression else ""
            raise GptDistError(
                f"{self.path}: not UTF-8: byte {self.position + error.start:,}{unpacked} is "
                f"0x{data[error.start]:02x} ({error.reason}); if it is {guess}, convert it: "
                f"iconv -f {guess} -t UTF-8"
            ) from None

    @property
    def done(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        place = self._raw.tell() if self._compression else self.position
        return min(1.0, place / self._size) if self._size else 1.0

    def _unreadable(self, error: OSError) -> GptDistError:
        return GptDistError(f"{self.path}: cannot be read: {error.strerror or error}")

    def close(self) -> None:
        self._file.close()
        self._raw.close()
