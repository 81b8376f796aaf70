"""Existing data sets, bad input and ``inspect``: nothing is lost, and one line says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.shards import write_shard
from gpt_dist.errors import UsageError
from gpt_dist.text.tokenizers import load_tokenizer
from tests.data.helpers import (
    EOT,
    command_line,
    run,
    snapshot,
    split_documents,
    tokens,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_the_same_again_is_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("shakespeare", "--tokenizer", "char")
    before = {path: path.stat().st_mtime_ns for path in Path("data/shakespeare-char").iterdir()}
    capsys.readouterr()
    assert run("shakespeare", "--tokenizer", "char", "--workers", 3) == 0
    said = capsys.readouterr().out
    assert said == (
        "data/shakespeare-char: is there already, with the same arguments (1,044,018 tokens)\n"
    )
    after = {path: path.stat().st_mtime_ns for path in Path("data/shakespeare-char").iterdir()}
    assert before == after


def test_another_data_set_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\nthree\n")
    command = ["text", "x.txt", "--out", "out"]
    run(*command, "--split", "lines")
    before = snapshot(tmp_path)
    for flags, difference in (
        (["--split", "eot"], "split = lines, not eot"),
        (["--split", "lines", "--val-fraction", 0.5], r"val_fraction = 0\.01, not 0\.5"),
        (["--split", "lines", "--seed", 7], "seed = 1337, not 7"),
        (["--split", "lines", "--tokenizer", "char"], "tokenizer = gpt2, not char"),
    ):
        with pytest.raises(UsageError, match=f"made with .*{difference}.*--overwrite"):
            run(*command, *flags)
        assert snapshot(tmp_path) == before
    (tmp_path / "x.txt").write_text("one\ntwo\nthree\nfour\n")
    with pytest.raises(
        UsageError, match=r"content = 1 file\(s\), 14 bytes .*, not 1 file\(s\), 19"
    ):
        run(*command, "--split", "lines")
    assert run(*command, "--split", "lines", "--overwrite") == 0
    assert len(split_documents(tokens("out")) + split_documents(tokens("out", "val"))) == 4


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    write_shard(tmp_path / "full" / "fineweb_train_000001.bin", np.arange(3, dtype=np.uint16))
    before = snapshot(tmp_path)
    for flags in ([], ["--overwrite"]):
        with pytest.raises(UsageError, match="full: not empty and no data set; choose another"):
            run("text", "x.txt", "--out", "full", *flags)
        with pytest.raises(UsageError, match=r"x\.txt: is a file"):
            run("text", "x.txt", "--out", "x.txt", *flags)
    assert snapshot(tmp_path) == before


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("word " * 100_000)
    done = command_line("text", "x.txt", "--out", "deep/out", limit=50_000)
    assert done.returncode == 1
    assert done.stderr == "error: File too large: deep/out/text_train_000000.bin\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.txt"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "x.txt").write_text("\n".join(f"line {n} of the text" for n in range(500)))
    run("text", "x.txt", "--split", "lines", "--out", "small", "--shard-tokens", 1000)
    return tmp_path / "small"


def test_inspect_shows_and_verifies(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("inspect", small) == 0
    said = capsys.readouterr().out
    assert "gpt2, vocabulary of 50,257, end-of-text token 50256" in said
    assert "begins with  '<|endoftext|>line 0 of the text<|endoftext|>line 2" in said
    assert "all checks passed" in said
    assert open_dataset(small).fingerprint in said


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip(p / "text_train_000001.bin", 1100), "000001.bin: damaged (sha256 differs)"),
        (lambda p: flip(p / "tokenizer.json", -5), "tokenizer.json: not a gpt2, char or bpe"),
        (lambda p: (p / "text_train_000001.bin").unlink(), "000001.bin: No such file"),
        (lambda p: cut(p / "text_val_000000.bin"), "val_000000.bin: truncated"),
    ],
)
def test_inspect_finds_damage(damage: Callable[[Path], None], message: str, small: Path) -> None:
    damage(small)
    done = command_line("inspect", small)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "all checks passed" not in done.stdout


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def test_inspect_of_llmcs_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    ids = np.array([EOT, *load_tokenizer("gpt2").encode("hello world")], np.uint16)
    write_shard(tmp_path / "d" / "fineweb_train_000001.bin", ids)
    assert run("inspect", "d") == 0
    said = capsys.readouterr().out
    assert "3 tokens in 1 shard(s), 1 document(s)" in said
    assert "begins with  '<|endoftext|>hello world'" in said
    write_shard(tmp_path / "d" / "fineweb_train_000002.bin", np.array([60000], np.uint16))
    assert run("inspect", "d") == 1
    assert "id 60000, beyond the vocabulary" in capsys.readouterr().err
