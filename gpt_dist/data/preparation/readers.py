"""Readers: the documents of text, JSON lines, parquet and hub data sets, as streams of pieces.

Each reader can resume at the ``next`` position of any of its pieces.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt_dist.data.preparation.documents import (
    PIECE_BYTES,
    ByteWindow,
    Piece,
    Position,
    longer,
    whole_document,
)
from gpt_dist.errors import GptDistError
from gpt_dist.text.cuts import Cut, gpt2_cut
from gpt_dist.text.gpt2_vocabulary import END_OF_TEXT

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LINE_BYTES = 1 << 27
"""Longest line of JSON that is accepted."""

SHOWN = 60
"""Characters of a line that a message about it shows."""
TextMode = Literal["files", "lines", "eot"]
SEPARATORS: dict[TextMode, str | None] = {"files": None, "lines": "\n", "eot": END_OF_TEXT}


def read_text(
    path: Path,
    mode: TextMode,
    at: Position,
    start: int = 0,
    end: int | None = None,
    cut: Cut = gpt2_cut,
) -> Iterator[Piece]:
    """The documents of a UTF-8 text file.

    Args:
        mode: ``files``: the file is one document, byte for byte; ``lines``: each line is one,
            without its line end; ``eot``: ``<|endoftext|>`` separates them, and white space around
            it is dropped. Documents of white space only are left out.
        at: where to resume, an earlier piece's ``next``.
        start, end: the part of the file to read, in bytes.
        cut: where the tokenizer lets a text be cut.

    Raises:
        GptDistError: the file cannot be read, is not UTF-8, or cannot be cut.
    """
    separator = SEPARATORS[mode]
    inside, wanted = at.inside, PIECE_BYTES
    with closing(ByteWindow(path, max(start, at.offset), end)) as window:
        ended = False
        while not ended:
            length = window.rfind(separator.encode()) if separator else -1
            if length < 0 and len(window) < wanted:
                if window.grow():
                    continue
                length, ended = len(window), True
            if length >= 0:  # yield all documents that end in this window
                block, position = window.text(length), window.position
                window.take(length if ended or not separator else length + len(separator))
                ascii_only, done = block.isascii(), window.done
                for document in block.split(separator) if separator else [block]:
                    position += len(document) if ascii_only else len(document.encode())
                    position = min(position + len(separator or ""), window.position)
                    text = _strip(document, mode, not inside, True)
                    if text and (inside or not text.isspace()):
                        yield Piece(text, not inside, Position(position), done)
                    inside, wanted = False, PIECE_BYTES
            else:  # a long document: yield a part without its end or a part of a separator
                text = window.text(len(window) - len(END_OF_TEXT), partial=True)
                body = _strip(text, mode, not inside, False)  # a cut is judged from where ids begin
                length = cut(body, len(body) - 1)
                if not length:
                    wanted = longer(wanted, str(path))
                    continue
                window.take(len(text[: len(text) - len(body) + length].encode()))
                yield Piece(body[:length], not inside, Position(window.position, True), window.done)
                inside, wanted = True, PIECE_BYTES


def _strip(text: str, mode: TextMode, first: bool, last: bool) -> str:
    if mode == "lines":
        return text.rstrip("\r\n") if last else text
    if mode == "eot":
        text = text.lstrip() if first else text
        text = text.rstrip() if last else text
    return text


def read_jsonl(path: Path, field: str, at: Position, cut: Cut = gpt2_cut) -> Iterator[Piece]:
    """The documents of a file with a JSON object on each line.

    Args:
        field: key of the text; ``a.b`` looks inside objects. Empty texts are left out.
        at: where to resume, an earlier piece's ``next``.

    Raises:
        GptDistError: the file cannot be read; a line is not JSON or has no such text.
    """
    with closing(ByteWindow(path, at.offset)) as window:
        ended = False
        while not ended:
            length = window.find(b"\n")
            if length < 0:
                if len(window) > MAX_LINE_BYTES:
                    raise GptDistError(
                        f"{path}: line {_line_number(path, window.position)}: longer than "
                        f"{MAX_LINE_BYTES:,} bytes; is this JSON lines?"
                    )
                if window.grow():
                    continue
                length, ended = len(window), True
            line = window.text(length).strip()
            line = line if window.position else line.removeprefix("\ufeff")
            try:
                text = _field(json.loads(line), field) if line else ""
            except (ValueError, RecursionError) as error:
                number = _line_number(path, window.position)
                reason = str(error)
                if isinstance(error, json.JSONDecodeError):
                    start = max(0, error.pos - SHOWN // 2)
                    near = line[start : start + SHOWN]
                    reason = f"not JSON: {error.msg} at character {error.pos + 1}, in {near!r}"
                raise GptDistError(f"{path}: line {number}: {reason}") from None
            window.take(length if ended else length + 1)
            yield from whole_document(text, str(path), cut, window.position, window.done)


def _field(row: Any, field: str) -> str:
    """The text of a row.

    Raises:
        ValueError: with a message for the user.
    """
    value = row
    for key in [field] if isinstance(row, dict) and field in row else field.split("."):
        if not isinstance(value, dict) or key not in value:
            keys = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
            raise ValueError(f"no field {field!r}{keys}; --field NAME reads another")
        value = value[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is not text: {json.dumps(value, default=str)[:60]}")
    return value


def _line_number(path: Path, position: int) -> str:
    """Number of the line that begins at a byte of the (decompressed) file."""
    count = 1
    with closing(ByteWindow(path, 0, position)) as window:
        while window.grow():
            count += window.bytes(len(window)).count(b"\n")
            window.take(len(window))
    return f"{count:,}"


def read_parquet(path: Path, column: str, at: Position, cut: Cut = gpt2_cut) -> Iterator[Piece]:
    """The documents of one column of a parquet file; empty ones are left out.

    Raises:
        GptDistError: not a parquet file, damaged, or without such a column of text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, buffer_size=PIECE_BYTES, pre_buffer=False) as file:
            _check_column(path, file.schema_arrow, column)
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group)
                if row + size.num_rows <= at.offset:
                    row += size.num_rows
                    continue
                # About 4 MB of rows of average size: long documents must not pile up.
                rows = size.num_rows * (1 << 22) // max(1, size.total_byte_size)
                for batch in file.iter_batches(
                    batch_size=min(1024, max(1, rows)), row_groups=[group], columns=[column]
                ):
                    for text in _texts(batch.column(0)):
                        row += 1
                        if text and row > at.offset:
                            done = row / file.metadata.num_rows
                            name = f"{path}: row {row:,}"
                            yield from whole_document(text, name, cut, row, done)
    except UnicodeDecodeError as error:
        raise GptDistError(f"{path}: row {row + 1:,}: not UTF-8: byte {error.start:,}") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise GptDistError(f"{path}: cannot be read as parquet: {reason}") from None


def _texts(values: pa.Array) -> Iterator[str | None]:
    try:
        texts = values.to_pylist()
    except UnicodeDecodeError:  # again one by one, to find out which row it is
        texts = (value.as_py() for value in values)
    yield from texts


def _check_column(path: Path, schema: pa.Schema, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise GptDistError(
            f"{path}: no column {column!r}; it has {', '.join(schema.names)}; "
            "prepare parquet --column NAME reads another"
        )
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise GptDistError(f"{path}: column {column!r} holds {kind}, not text")


def read_hub(
    rows: Any, name: str, field: str, total: int | None, at: Position, cut: Cut = gpt2_cut
) -> Iterator[Piece]:
    """The documents of a streaming data set of Hugging Face ``datasets``.

    Args:
        rows: the ``IterableDataset``.
        field: key of the text.
        total: rows in all, where known.

    Raises:
        GptDistError: a row cannot be read, or has no such text.
    """
    values = iter(rows.skip(at.offset) if at.offset else rows)
    for row in itertools.count(at.offset + 1):
        try:
            value = next(values)
            text = _field(value, field)
        except StopIteration:
            return
        except Exception as error:  # the library raises errors of many kinds
            reason = " ".join(str(error).split())
            raise GptDistError(f"{name}: row {row:,}: {reason[:300]}") from None
        done = row / total if total else 0.0
        yield from whole_document(text, f"{name}: row {row:,}", cut, row, done)
