"""Token shards: llm.c's format to the byte, windows across shards, and all kinds of damage."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_dist.data import dataset
from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.shards import ShardWriter, TokenStream, check_ids, read_shard, write_shard
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.text.tokenizers import CharTokenizer, load_tokenizer


def llmc_bytes(tokens: list[int], model: str = "gpt-2") -> bytes:
    """A shard as llm.c's data_common.py describes it, by hand."""
    magic, version, letter = {"gpt-2": (20240520, 1, "H"), "llama-3": (20240801, 7, "I")}[model]
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}{letter}", *tokens)


def llmc_directory(directory: Path) -> Path:
    """Two training shards and one for validation, without dataset.json."""
    directory.mkdir()
    for name, tokens in (
        ("fineweb_train_000001", range(100)),
        ("fineweb_train_000002", range(100, 150)),
        ("fineweb_val_000000", [50256, 1, 2]),
    ):
        (directory / f"{name}.bin").write_bytes(llmc_bytes(list(tokens)))
    return directory


def test_shards_are_llmcs_to_the_byte(tmp_path: Path) -> None:
    tokens = [0, 50256, 65535, 1]
    digest = write_shard(tmp_path / "x.bin", np.array(tokens, np.uint16))
    assert (tmp_path / "x.bin").read_bytes() == llmc_bytes(tokens)
    done = subprocess.run(["sha256sum", tmp_path / "x.bin"], capture_output=True, text=True)
    assert done.stdout.split()[0] == digest
    (tmp_path / "y.bin").write_bytes(llmc_bytes(tokens))
    assert read_shard(tmp_path / "y.bin").tolist() == tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "y.bin"]


def test_large_ids_are_in_llmcs_other_format(tmp_path: Path) -> None:
    """That of its Llama 3, with 32 bits. One stream may mix both."""
    tokens = [0, 128255, 65536, 1]
    write_shard(tmp_path / "a.bin", np.array(tokens, np.uint32))
    assert (tmp_path / "a.bin").read_bytes() == llmc_bytes(tokens, "llama-3")
    write_shard(tmp_path / "b.bin", np.array([65535, 7], np.uint16))
    stream = TokenStream([tmp_path / "b.bin", tmp_path / "a.bin"], vocab_size=128256)
    assert stream.gather(np.array([0, 1, 2]), 3).tolist() == [
        [65535, 7, 0], [7, 0, 128255], [0, 128255, 65536],
    ]  # fmt: skip
    assert stream.read(0, 6).tolist() == [65535, 7, *tokens]
    with pytest.raises(GptDistError, match="has the id 128255, beyond the vocabulary"):
        TokenStream([tmp_path / "a.bin"], vocab_size=128255).gather(np.array([0]), 4)
    writer = ShardWriter(tmp_path / "c.bin", np.uint32)
    writer.write(np.array([70000, 1, 2], np.uint32))
    writer.close()
    writer = ShardWriter(tmp_path / "c.bin", np.uint32, resume=1)
    writer.write(np.array([80000], np.uint32))
    writer.finish()
    assert read_shard(tmp_path / "c.bin").tolist() == [70000, 80000]


def test_a_shard_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"

    def fail() -> None:
        with ShardWriter(path) as writer:
            writer.write(np.arange(5, dtype=np.uint16))
            assert not path.exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 40), max_size=6), st.data())
@settings(deadline=None, max_examples=25)
def test_an_interrupted_shard_resumes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    """Whatever was written after the point to resume at, also if the shard was finished."""
    path = tmp_path_factory.mktemp("s") / "x.bin"
    tokens = np.arange(sum(sizes) + 1, dtype=np.uint16)
    kept = data.draw(st.integers(1, len(tokens)))
    writer = ShardWriter(path)
    writer.write(tokens[:kept])
    writer.sync()
    writer.write(np.full(data.draw(st.integers(0, 50)), 7, np.uint16))
    if data.draw(st.booleans()):
        writer.finish()
    else:
        writer.close()
    again = ShardWriter(path, resume=kept)
    again.write(tokens[kept:])
    again.finish()
    assert path.read_bytes() == llmc_bytes(tokens.tolist())


def test_resuming_needs_what_was_written(tmp_path: Path) -> None:
    with pytest.raises(GptDistError, match=r"x\.bin\.part: missing or shorter than 1,034 bytes"):
        ShardWriter(tmp_path / "x.bin", resume=5)


def test_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, sys, numpy as np; from gpt_dist.errors import run_main\n"
        "from gpt_dist.data.shards import write_shard\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "run_main(lambda: write_shard(sys.argv[1], np.zeros(100_000, np.uint16)) and 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.bin"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == f"error: File too large: {tmp_path / 'x.bin'}\n"
    assert list(tmp_path.iterdir()) == []


GOOD = llmc_bytes([1, 2, 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "not a token shard: an empty file, expected magic 20240520"),
        (b"\x01", "not a token shard"),
        (b"not a shard at all" * 100, "not a token shard: magic 544501614"),
        (struct.pack("<256i", 20240520, 7, 3, *[0] * 253) + bytes(6), "version 7, expected 1"),
        (GOOD[:600], "truncated: 600 bytes, but 3 tokens make 1,030"),
        (GOOD[:-1], "truncated: 1,029 bytes, but 3 tokens make 1,030"),
        (GOOD + b"\0\0", "not what its header says: 1,032 bytes, but 3 tokens make 1,030"),
        (llmc_bytes([1, 2], "llama-3")[:-4], "truncated: 1,028 bytes, but 2 tokens make 1,032"),
        (struct.pack("<256i", 20240520, 1, -5, *[0] * 253), "not what its header says"),
    ],
)
def test_damaged_shards(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x_train_000000.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GptDistError, match=message) as caught:
        TokenStream([path])
    assert str(path) in str(caught.value)
    assert caught.value.exit_status == 1


def test_empty_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.empty(0, np.uint16))
    write_shard(tmp_path / "b.bin", np.arange(3, dtype=np.uint16))
    stream = TokenStream([tmp_path / "a.bin", tmp_path / "b.bin", tmp_path / "a.bin"])
    assert stream.gather(np.array([0, 1]), 2).tolist() == [[0, 1], [1, 2]]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 12), st.data())
@settings(deadline=None, max_examples=60)
def test_windows_are_slices_of_the_stream(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("w")
    tokens = np.random.default_rng(0).integers(0, 65536, sum(sizes)).astype(np.uint16)
    ends = np.cumsum(sizes)
    paths = [directory / f"{index}.bin" for index in range(len(sizes))]
    for path, size, end in zip(paths, sizes, ends, strict=True):
        path.write_bytes(llmc_bytes(tokens[end - size : end].tolist()))
    stream = TokenStream(paths)
    assert len(stream) == len(tokens)
    assert stream.read(0, len(tokens)).tolist() == tokens.tolist()
    if length <= len(tokens):
        starts = data.draw(st.lists(st.integers(0, len(tokens) - length), max_size=20))
        found = stream.gather(np.array(starts, dtype=np.int64), length)
        assert found.dtype == np.uint16
        assert found.shape == (len(starts), length)
        assert found.tolist() == [tokens[start : start + length].tolist() for start in starts]
    for start in (-1, len(tokens) - length + 1):
        with pytest.raises(IndexError):
            stream.gather(np.array([start]), length)
        with pytest.raises(IndexError):
            stream.read(start, length)


def test_ids_beyond_the_vocabulary_are_found(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.arange(10, dtype=np.uint16))
    write_shard(tmp_path / "b.bin", np.array([1, 2, 99, 3], np.uint16))
    stream = TokenStream([tmp_path / "a.bin", tmp_path / "b.bin"], vocab_size=50)
    assert stream.gather(np.array([0, 5, 8]), 4).shape == (3, 4)
    for start, where in ((11, "from token 1: token 1 "), (9, "from token 0: token 2 ")):
        with pytest.raises(GptDistError, match=rf"b\.bin, {where}has the id 99, .*0 to 49"):
            stream.gather(np.array([0, start]), 4 if start == 9 else 3)
    check_ids(np.array([49], np.uint16), 50)
    with pytest.raises(GptDistError, match="here: token 1 has the id 50"):
        check_ids(np.array([49, 50], np.uint16), 50, "here")


def test_llmcs_own_shards_work(tmp_path: Path) -> None:
    dataset = open_dataset(llmc_directory(tmp_path / "fineweb10B"))
    assert (dataset.tokenizer.name, dataset.info) == ("gpt2", {})
    train, val = dataset.split("train"), dataset.split("val")
    assert train is not None
    assert val is not None
    assert train.read(95, 10).tolist() == list(range(95, 105))
    assert val.read(0, 3).tolist() == [50256, 1, 2]
    CharTokenizer("abc").save(tmp_path)
    train = open_dataset(tmp_path / "fineweb10B", str(tmp_path)).split("train")
    assert train is not None
    with pytest.raises(GptDistError, match="beyond the vocabulary"):
        train.read(0, 100)


def test_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    one = llmc_directory(tmp_path / "one")
    expected = open_dataset(one).fingerprint
    shutil.copytree(one, tmp_path / "elsewhere")
    assert open_dataset(tmp_path / "elsewhere").fingerprint == expected
    CharTokenizer(map(chr, range(200))).save(tmp_path)
    assert open_dataset(one, str(tmp_path)).fingerprint != expected
    (one / "fineweb_train_000003.bin").write_bytes(llmc_bytes([1]))
    assert open_dataset(one).fingerprint != expected


def test_a_missing_split(tmp_path: Path) -> None:
    directory = llmc_directory(tmp_path / "x")
    (directory / "fineweb_val_000000.bin").unlink()
    dataset = open_dataset(directory)
    assert dataset.split("val") is None
    train = dataset.split("train")
    assert train is not None
    assert len(train) == 150


PREPARE = "no data there; make it with: python -m gpt_dist.prepare "


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("data/shakespeare", "shakespeare"),
        ("data/shakespeare-char", "shakespeare --tokenizer char"),
        ("data/tinyshakespeare-bpe", "tinyshakespeare --tokenizer bpe"),
        ("data/tinystories", "tinystories"),
        ("data/fineweb-edu-sample-10BT", "fineweb-edu --variant sample-10BT"),
        ("data/fineweb-sample-100BT", "fineweb --variant sample-100BT"),
        ("data/fineweb-CC-MAIN-2024-10", "fineweb --variant CC-MAIN-2024-10"),
        ("/mnt/tinystories", "tinystories --out /mnt/tinystories"),
        ("data/whatever", r"SOURCE \(--help lists the sources\)"),
    ],
)
def test_missing_data_says_how_to_make_it(
    path: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"^{path}: {PREPARE}{command}$"):
        open_dataset(path)


def test_unfinished_and_damaged_data_sets_are_refused(tmp_path: Path) -> None:
    directory = llmc_directory(tmp_path / "x")
    (directory / "prepare.journal").write_text("{}")
    with pytest.raises(GptDistError, match=r"x: not finished .* run the same prepare command"):
        open_dataset(directory)
    for content, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format_version": 1}', "damaged"),
        ('{"format_version": 9, "fingerprint": "x", "splits": {}}', "format_version 9"),
    ):
        (directory / "dataset.json").write_text(content)
        with pytest.raises(GptDistError, match=rf"dataset\.json: {message}"):
            open_dataset(directory)
    shards = [{"file": "fineweb_train_000001.bin", "tokens": 99, "sha256": ""}]
    info = {"format_version": 1, "fingerprint": "f", "splits": {"train": {"shards": shards}}}
    (directory / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(GptDistError, match=r"000001\.bin: holds 100 tokens, but .* says 99"):
        open_dataset(directory)


def test_a_renamed_key_has_one_place_to_migrate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set of format 1 loads in a format 2 that renames "print" to "fingerprint"."""

    def rename(info: dict[str, Any]) -> dict[str, Any]:
        return info | {"format_version": 2, "fingerprint": info["print"]}

    directory = llmc_directory(tmp_path / "x")
    load_tokenizer("gpt2").save(directory)
    shards = [{"file": "fineweb_train_000001.bin", "tokens": 100, "sha256": ""}]
    info = {"format_version": 1, "print": "f", "splits": {"train": {"shards": shards}}}
    (directory / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(GptDistError, match="damaged"):
        open_dataset(directory)
    monkeypatch.setattr(dataset, "DATASET_FORMAT_VERSION", 2)
    monkeypatch.setitem(dataset.MIGRATIONS, 1, rename)
    assert open_dataset(directory).fingerprint == "f"


def test_more_shards_than_the_usual_limit_of_open_files(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.arange(4, dtype=np.uint16))
    code = (
        "import resource, sys; from gpt_dist.data.shards import TokenStream\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "print(len(TokenStream([sys.argv[1]] * 200)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.bin"], capture_output=True, text=True
    )
    assert done.stdout == "800\n", done.stderr
