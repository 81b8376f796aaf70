"""Documents in pieces: they join to the document, and reading resumes after any piece."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_dist.data.preparation import documents, readers
from gpt_dist.data.preparation.documents import START, Piece, Position, cut_text
from gpt_dist.data.preparation.readers import TextMode, read_jsonl, read_parquet, read_text
from gpt_dist.errors import GptDistError
from gpt_dist.text.cuts import gpt2_cut
from gpt_dist.text.tokenizers import END_OF_TEXT, load_tokenizer

LETTERS = [*"ab 'st  \n\n\t\r\x1c\x85\u00a0\u3000\u200b019.,!-é\u0301ßж語中、。🙂\u200d٣½"]
TEXTS = st.text(st.sampled_from(LETTERS) | st.characters(exclude_categories=["Cs"]), max_size=60)
PIECES = st.lists(TEXTS | st.sampled_from(["'re", "don't", "   ", "== "]), max_size=6).map("".join)

gpt2 = load_tokenizer("gpt2")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets short texts reach the limits."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 32)
    monkeypatch.setattr(readers, "PIECE_BYTES", 32)


def whole(pieces: Iterator[Piece] | list[Piece]) -> list[str]:
    """The documents that pieces make."""
    found: list[str] = []
    for piece in pieces:
        assert piece.text
        if piece.starts:
            found.append("")
        found[-1] += piece.text
    return found


def resumes_after_every_piece(read: Callable[[Position], Iterator[Piece]]) -> None:
    """The documents are the same; a long one may be cut elsewhere."""

    def marked(pieces: Iterable[Piece]) -> str:
        return "".join("|" * piece.starts + piece.text for piece in pieces)

    pieces = list(read(START))
    for index, piece in enumerate(pieces):
        assert 0 <= piece.done <= 1
        if piece.next is not None:
            assert marked(read(piece.next)) == marked(pieces[index + 1 :])
    if pieces:
        assert pieces[-1].next is not None


EXPECTED: dict[TextMode, Callable[[str], list[str]]] = {
    "files": lambda text: [text] if text.strip() else [],
    "lines": lambda text: [
        line for line in (part.rstrip("\r\n") for part in text.split("\n")) if line.strip()
    ],
    "eot": lambda text: [part.strip() for part in text.split(END_OF_TEXT) if part.strip()],
}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("mode", ["files", "lines", "eot"])
def test_text_files(mode: TextMode, tmp_path: Path) -> None:
    @given(st.lists(PIECES | st.sampled_from([END_OF_TEXT, "<|endof", "\n"]), max_size=12))
    @settings(deadline=None, max_examples=80)
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        path = tmp_path / "x.txt"
        path.write_bytes(text.encode())
        assert whole(read_text(path, mode, START)) == EXPECTED[mode](text)
        resumes_after_every_piece(lambda at: read_text(path, mode, at))

    check()


@pytest.mark.usefixtures("small_pieces")
def test_long_documents_come_in_pieces(tmp_path: Path) -> None:
    text = "word " * 1000
    (tmp_path / "x.txt").write_text(text)
    pieces = list(read_text(tmp_path / "x.txt", "files", START))
    assert len(pieces) > 50
    assert max(len(piece.text) for piece in pieces) <= 80
    assert whole(pieces) == [text]
    assert [token for piece in pieces for token in gpt2.encode(piece.text)] == gpt2.encode(text)
    assert "".join(cut_text(text, "x", gpt2_cut)) == text
    assert max(map(len, cut_text(text, "x", gpt2_cut))) <= 32


def test_a_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"0123456789")
    (piece,) = read_text(tmp_path / "x.txt", "files", START, 3, 7)
    assert piece.text == "3456"
    assert list(read_text(tmp_path / "x.txt", "files", Position(7), 3, 7)) == []


def write_compressed(path: Path, data: bytes) -> None:
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(data))
        case ".bz2":
            path.write_bytes(bz2.compress(data))
        case _:
            with pa.output_stream(
                str(path), compression=path.suffix[1:].replace("zst", "zstd")
            ) as out:
                out.write(data)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst", ".lz4"])
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.txt{suffix}"
    write_compressed(path, "one two\nthree 語\n".encode() * 60)
    assert whole(read_text(path, "lines", START)) == ["one two", "three 語"] * 60
    resumes_after_every_piece(lambda at: read_text(path, "lines", at))
    path.write_bytes(b"not compressed")
    with pytest.raises(GptDistError, match=f"x.txt{suffix}: cannot be read"):
        list(read_text(path, "lines", START))


@pytest.mark.parametrize("position", [0, 300_000, 599_999])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_invalid_utf8_is_named_by_its_byte(position: int, suffix: str, tmp_path: Path) -> None:
    data = bytearray(b"abcd efg\n" * 66_667)[:600_000]
    data[position] = 0xFF
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(gzip.compress(bytes(data)) if suffix else bytes(data))
    for mode in ("files", "lines", "eot"):
        with pytest.raises(GptDistError, match=rf"not UTF-8: byte {position:,} .*is 0xff"):
            list(read_text(path, mode, START))  # type: ignore[arg-type]


def test_a_character_cut_off_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("aé".encode()[:-1])
    with pytest.raises(GptDistError, match=r"byte 1 is 0xc3 \(unexpected end of data\)"):
        list(read_text(tmp_path / "x.txt", "files", START))


def test_what_cannot_be_cut_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    monkeypatch.setattr(readers, "PIECE_BYTES", 64)
    monkeypatch.setattr(documents, "MAX_RUN", 1024)
    (tmp_path / "x.txt").write_text("a" * 5000)
    with pytest.raises(GptDistError, match=r"x\.txt: more than 1,024 characters without a space"):
        list(read_text(tmp_path / "x.txt", "eot", START))
    with pytest.raises(GptDistError, match="more than 1,024 characters"):
        list(cut_text("a" * 5000, "x", gpt2_cut))
    (tmp_path / "x.txt").write_text("a" * 900 + " b" * 500)
    assert whole(read_text(tmp_path / "x.txt", "eot", START)) == ["a" * 900 + " b" * 500]


ROWS = ["one", "", "  \n", "two\n\nthree", "語 " * 100, "last\ud83d\ude42"]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_lines(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    lines = [json.dumps({"id": 1, "text": row, "meta": {"body": row}}) for row in ROWS]
    lines.insert(2, "")
    lines.append(json.dumps({"text": None, "meta": {"body": None}}))
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if suffix else data)
    expected = ["one", "two\n\nthree", "語 " * 100, "last🙂"]
    for field in ("text", "meta.body"):
        assert whole(read_jsonl(path, field, START)) == expected
        resumes_after_every_piece(lambda at, field=field: read_jsonl(path, field, at))  # type: ignore[misc]


def test_a_byte_order_mark_before_json_is_not_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    assert whole(read_jsonl(path, "text", START)) == ["one", "two"]


def test_lone_surrogates_become_what_tiktoken_makes_of_them(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    (piece,) = read_jsonl(path, "text", START)
    assert piece.text == "a\ufffdb"
    assert gpt2.encode(piece.text) == gpt2.encode("a\ud800b")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"line 3: not JSON: Expecting ',' delimiter at character 13, in '.*: .x"),
        ('{"body": "x", "id": 3}', r"line 3: no field 'text'; it has body, id"),
        ('{"text": 5}', r"line 3: field 'text' is not text: 5"),
        ("[1]", r"line 3: no field 'text'"),
        ("[" * 100_000, r"line 3: maximum recursion depth"),
    ],
)
def test_lines_that_are_not_what_they_should_be(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' * 2 + line + '\n{"text": "fine"}\n')
    with pytest.raises(GptDistError, match=rf"x\.jsonl: {message}"):
        list(read_jsonl(path, "text", START))


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "' + "a" * (1 << 22))
    with pytest.raises(GptDistError, match="line 1: longer than 1,048,576 bytes"):
        list(read_jsonl(path, "text", START))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("row_group_size", [1, 4, 1000])
def test_parquet(kind: pa.DataType, row_group_size: int, tmp_path: Path) -> None:
    rows = [None, *(row.encode("utf-16", "surrogatepass").decode("utf-16") for row in ROWS)] * 5
    table = pa.table({"id": range(len(rows)), "text": pa.array(rows).cast(kind)})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=row_group_size)
    expected = ["one", "two\n\nthree", "語 " * 100, "last🙂"] * 5
    assert whole(read_parquet(path, "text", START)) == expected
    resumes_after_every_piece(lambda at: read_parquet(path, "text", at))


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    binary = pa.array([b"fine", b"\xff"]).view(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, binary.buffers())
    pq.write_table(pa.table({"text": text, "n": [1, 2]}), path)
    with pytest.raises(GptDistError, match=r"x\.parquet: row 2: not UTF-8: byte 0"):
        list(read_parquet(path, "text", START))
    with pytest.raises(GptDistError, match=r"no column 'body'; it has text, n"):
        list(read_parquet(path, "body", START))
    with pytest.raises(GptDistError, match=r"column 'n' holds int64, not text"):
        list(read_parquet(path, "n", START))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(GptDistError, match=r"x\.parquet: cannot be read as parquet"):
        list(read_parquet(path, "text", START))
