"""The validation split: its size where documents are few, and what is said about it."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.preparation import inputs, tokenize_pool
from gpt_dist.data.preparation import run as preparation
from gpt_dist.errors import GptDistError
from gpt_dist.text.tokenizers import END_OF_TEXT
from tests.data.helpers import EOT, encoding, run, snapshot, split_documents, tokens

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def book(seed: int, paragraphs: int, separator: str = "\n\n") -> str:
    """Paragraphs of two lines, with characters of several bytes."""
    dice = random.Random(seed)

    def line() -> str:
        return " ".join(dice.choices(["naïve", "語", "cat", "sat", "🙂"], k=8))

    return separator.join(f"{line()}\n{line()}." for _ in range(paragraphs)) + "\n"


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_of_few_files_the_last_part_of_each_is_for_validation(
    suffix: str, fraction: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books = [book(0, 60), book(1, 20), book(2, 40)]
    for name, text in zip("abc", books, strict=True):
        data = text.encode()
        (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix[4:] else data)
    assert (
        run("text", *(f"{n}{suffix}" for n in "abc"), "--val-fraction", fraction, "--out", "o") == 0
    )
    decode = open_dataset("o").tokenizer.decode
    train, val = ([decode(d) for d in split_documents(tokens("o", s))] for s in ("train", "val"))
    assert [one + other for one, other in zip(train, val, strict=True)] == books
    for whole, part in zip(books, val, strict=True):
        assert len(part) == pytest.approx(fraction * len(whole), rel=0.26)
        assert whole[: -len(part)].endswith(".\n\n"), "between two paragraphs"
    for text in (train, val):  # and the ids are those of each part by itself
        assert split_documents(tokens("o", "train" if text is train else "val")) == (
            encoding().encode_ordinary_batch(text)
        )
    said = capsys.readouterr()
    assert f"({fraction:.2%} wanted): the last part of each document" in said.out
    assert said.err == ""
    assert open_dataset("o").info["validation"] == "parts"
    assert run("inspect", "o") == 0
    assert "validation   the last part of each document" in capsys.readouterr().out


def test_the_best_boundary_near_the_wanted_place(tmp_path: Path) -> None:
    """A paragraph, else a line, else a word, else any character; never in the middle of one."""
    cases = {
        book(0, 60): "\n\n",
        book(0, 60, "\n"): "\n",
        book(0, 60).replace("\n", " "): " ",
        "語" * 2000: "語",
        book(0, 60).replace("\n", "\r\n"): "\r\n\r\n",
    }
    for text, end in cases.items():
        (tmp_path / "x.txt").write_bytes(text.encode())
        parts = inputs.split_at_line(
            inputs.FileInput(Path("x.txt"), inputs.text_reader("files")), 0.2
        )
        read = ["".join(p.text for p in part.read(inputs.Position(), len_cut)) for part in parts]
        assert "".join(read) == text
        assert read[0].endswith(end)
        assert len(read[1]) == pytest.approx(0.2 * len(text), rel=0.26)


def len_cut(text: str, limit: int) -> int:
    return limit


def test_a_short_file_is_for_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("a b c d e f g h i j k l m n o p q r s t")
    assert run("text", "a.txt", "b.txt", "c.txt", "--val-fraction", 0.2, "--out", "o") == 0
    decode = open_dataset("o").tokenizer.decode
    assert decode(split_documents(tokens("o"))[0]) == "x"
    assert decode(tokens("o", "val")).removeprefix(END_OF_TEXT) in "o p q r s t"


def test_of_many_documents_whole_ones_are_chosen_as_in_the_first_release(tmp_path: Path) -> None:
    """Indices found by the hash that release 0.1 used, written out here."""
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(f"document {number}")
    assert run("text", tmp_path, "--val-fraction", 0.1, "--out", "o") == 0

    def mixed(index: int) -> int:
        mask = 2**64 - 1
        value = (index + (1337 << 32)) * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15 & mask
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
        return value ^ value >> 31

    chosen = [n for n in range(40) if n == 1 or (n and mixed(n) < 0.1 * 2**64)]
    ids = encoding().encode_ordinary_batch([f"document {number}" for number in chosen])
    assert split_documents(tokens("o", "val")) == ids
    assert open_dataset("o").info["validation"] == "documents"


def test_a_share_far_from_the_wanted_one_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one two"}\n{"text": "three four"}\n')
    assert run("jsonl", "x.jsonl", "--val-fraction", 0.1, "--out", "o") == 0
    said = capsys.readouterr()
    assert "validation: 50.00% of the tokens (10.00% wanted): whole documents" in said.out
    assert said.err.startswith("note: o: validation: 50.00% of the tokens (10.00% wanted)")
    assert "documents are few or unequally long" in said.err
    assert run("jsonl", "x.jsonl", "--val-fraction", 0.5, "--out", "p") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", ["files", "lines", "eot"])
def test_separators_in_plain_text_are_told_once(
    mode: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenize_pool, "CHUNK_CHARACTERS", 100)
    text = f"a story\n{END_OF_TEXT}\nanother story\n{END_OF_TEXT}\n" * 50
    (tmp_path / "x.txt").write_text(text)
    (tmp_path / "y.txt").write_text(text)
    run("text", "x.txt", "y.txt", "--split", mode, "--val-fraction", 0.2, "--out", "o")
    said = capsys.readouterr().err
    if mode == "eot":
        assert "contains" not in said
        assert tokens("o").count(EOT) > 100
    else:
        assert said.count(f"contains {END_OF_TEXT}; --split {mode} reads it as plain text") == 1
        assert "--split eot" in said


@pytest.mark.slow(2)
def test_a_resumed_attempt_keeps_its_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of the first release, whose journal names no rule."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(book(ord(name), 9000))
    monkeypatch.setattr(preparation, "COMMIT_SECONDS", 0)
    command = ["text", "a.txt", "b.txt", "c.txt", "--val-fraction", 0.1]
    assert run(*command, "--out", "parts") == 0
    monkeypatch.setattr("gpt_dist.data.preparation.validation.FEW", 0)
    assert run(*command, "--out", "documents") == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "COMMIT_SECONDS", 0)

    def interrupted(out: str) -> None:
        update, calls = preparation.WorkProgress.update, []

        def fail(self: object, *values: object) -> None:
            calls.append(values)
            if len(calls) == 3:
                raise GptDistError("stopped")
            update(self, *values)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(preparation.WorkProgress, "update", fail)
            with pytest.raises(GptDistError, match="stopped"):
                run(*command, "--workers", 1, "--out", out)
        assert (tmp_path / out / "prepare.journal").exists()

    interrupted("new")
    assert run(*command, "--out", "new") == 0
    assert tokens("new", "val") == tokens("parts", "val")
    assert tokens("new") == tokens("parts")
    with monkeypatch.context() as patch:
        patch.setattr("gpt_dist.data.preparation.validation.FEW", 0)
        interrupted("old")
    journal = json.loads((tmp_path / "old/prepare.journal").read_text())
    del journal["validation"]
    (tmp_path / "old/prepare.journal").write_text(json.dumps(journal))
    assert run(*command, "--out", "old") == 0
    assert snapshot(tmp_path / "old") == snapshot(tmp_path / "documents")
