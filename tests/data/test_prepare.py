"""Preparing data: ids equal tiktoken's for every source, and nothing breaks it half-way."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from gpt_dist import prepare
from gpt_dist.data.preparation import run as preparation
from gpt_dist.data.preparation import tokenize_pool
from gpt_dist.data.shards import open_dataset, write_shard
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.text.gpt2_vocabulary import merge_ranks
from gpt_dist.text.tokenizers import END_OF_TEXT, load_tokenizer
from tests.file_server import serve

EOT = 50256


def encoding() -> tiktoken.Encoding:
    """tiktoken itself, only with the table at hand instead of fetched."""
    from tiktoken_ext import openai_public

    return tiktoken.Encoding(
        "r50k",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=merge_ranks(),
        special_tokens={END_OF_TEXT: EOT},
    )


def stories(count: int, seed: int = 0) -> list[str]:
    """Documents of many lengths with all sorts of characters; no surrounding white space."""
    generator = random.Random(seed)
    words = [
        "the",
        "naïve",
        "cat's",
        "3rd",
        "café,",
        "東京",
        "「語」",
        "isn't",
        "🙂",
        "x=1;",
        "(well)",
    ]
    words += ["…\n", "end.\n\n"]
    documents = []
    for number in range(count):
        length = generator.choice([1, 5, 40, 40, 400])
        text = " ".join(generator.choices(words, k=length)).strip()
        documents.append(f"{number} {text}!")
    return documents


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> int:
    """``python -m gpt_dist.prepare ARGUMENTS``, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
        return prepare.main()


def tokens(directory: Path | str, split: str = "train") -> list[int]:
    stream = open_dataset(directory).split(split)  # type: ignore[arg-type]
    return [] if stream is None else stream.read(0, len(stream)).tolist()


def split_documents(ids: list[int]) -> list[list[int]]:
    assert not ids or ids[0] == EOT
    documents: list[list[int]] = []
    for token in ids:
        if token == EOT:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def snapshot(directory: Path) -> dict[str, str]:
    """Every file and its content."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# --- every source gives tiktoken's ids -----------------------------------------------------------

Writer = Callable[[Path, list[str]], list[object]]


def text_eot(place: Path, documents: list[str]) -> list[object]:
    (place / "x.txt").write_text(f"\n{END_OF_TEXT}\n".join(documents))
    return ["text", place / "x.txt", "--split", "eot"]


def text_lines(place: Path, documents: list[str]) -> list[object]:
    documents[:] = [document.replace("\n", " ").strip() for document in documents]
    (place / "x.txt").write_text("\n".join(documents))
    return ["text", place, "--split", "lines"]


def text_files(place: Path, documents: list[str]) -> list[object]:
    for number, document in enumerate(documents):
        (place / f"{number:04}.txt").write_text(document)
    return ["text", place]


def text_packed(place: Path, documents: list[str]) -> list[object]:
    (place / "x.txt.gz").write_bytes(gzip.compress(END_OF_TEXT.join(documents).encode()))
    return ["text", f"{place}/*.gz", "--split", "eot"]


def jsonl(place: Path, documents: list[str]) -> list[object]:
    rows = [json.dumps({"id": n, "body": text}) for n, text in enumerate(documents)]
    (place / "a.jsonl").write_text("\n".join(rows[:100]))
    (place / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[100:]).encode()))
    return ["jsonl", place, "--field", "body"]


def write_parquet(path: Path, documents: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(documents)), column: documents})
    pq.write_table(table, path, row_group_size=37)


def parquet(place: Path, documents: list[str]) -> list[object]:
    write_parquet(place / "x.parquet", documents, "content")
    return ["parquet", place / "x.parquet", "--column", "content"]


def hub_layout(place: Path, documents: list[str], folder: str) -> None:
    write_parquet(place / folder / "000_00000.parquet", documents[:150])
    write_parquet(place / folder / "001_00000.parquet", documents[150:])


def fineweb(place: Path, documents: list[str]) -> list[object]:
    hub_layout(place, documents, "sample/10BT")
    return ["fineweb-edu", "--source", place]


def fineweb_dump(place: Path, documents: list[str]) -> list[object]:
    hub_layout(place, documents, "data/CC-MAIN-2024-10")
    return ["fineweb", "--variant", "CC-MAIN-2024-10", "--source", place]


def tinystories_file(place: Path, documents: list[str]) -> list[object]:
    (place / "any.txt").write_text(f"\n{END_OF_TEXT}\n".join(documents))
    return ["tinystories", "--source", place / "any.txt"]


def hf(place: Path, documents: list[str]) -> list[object]:
    write_parquet(place / "data" / "train-00000-of-00001.parquet", documents)
    return ["hf", place]


SOURCES: list[Writer] = [
    text_eot, text_lines, text_files, text_packed, jsonl, parquet, fineweb, fineweb_dump,
    tinystories_file, hf,
]  # fmt: skip


@pytest.mark.parametrize("write", SOURCES, ids=lambda function: function.__name__)
def test_ids_equal_tiktokens_document_by_document(write: Writer, tmp_path: Path) -> None:
    documents = stories(300)
    (tmp_path / "in").mkdir()
    command = write(tmp_path / "in", documents)
    expected = encoding().encode_ordinary_batch(documents)

    assert run(*command, "--out", "all", "--val-fraction", 0) == 0
    assert split_documents(tokens("all")) == expected
    assert tokens("all", "val") == []

    flags = ["--val-fraction", 0.2, "--shard-tokens", 5000, "--workers", 3]
    assert run(*command, "--out", "two", *flags) == 0
    train, val = (split_documents(tokens("two", split)) for split in ("train", "val"))
    assert len(train) + len(val) == len(expected)
    assert 30 < len(val) < 90, "about a fifth"
    order = [expected.index(document) for document in train]
    assert order == sorted(order)
    assert sorted(train + val) == sorted(expected)
    sizes = [shard["tokens"] for shard in open_dataset("two").info["splits"]["train"]["shards"]]
    assert set(sizes[:-1]) == {5000}
    assert 0 < sizes[-1] <= 5000
    info = open_dataset("two").info["splits"]
    assert sum(entry["bytes"] for entry in info.values()) == sum(len(d.encode()) for d in documents)
    assert sum(entry["documents"] for entry in info.values()) == 300
    assert run("inspect", "two") == 0


@pytest.mark.parametrize("suffix", [".txt", ".parquet"])
def test_tinystories_has_its_own_validation(suffix: str, tmp_path: Path) -> None:
    train, val = stories(50), stories(10, seed=1)
    place = tmp_path / "in" / "data"
    if suffix == ".txt":
        place.mkdir(parents=True)
        (place / "TinyStoriesV2-GPT4-train.txt").write_text(f"\n{END_OF_TEXT}\n".join(train))
        (place / "TinyStoriesV2-GPT4-valid.txt").write_text(f"\n{END_OF_TEXT}\n".join(val))
    else:
        write_parquet(place / "train-00000-of-00002.parquet", train[:20])
        write_parquet(place / "train-00001-of-00002.parquet", train[20:])
        write_parquet(place / "validation-00000-of-00001.parquet", val)
    assert run("tinystories", "--source", "in") == 0
    assert split_documents(tokens("data/tinystories")) == encoding().encode_ordinary_batch(train)
    found = split_documents(tokens("data/tinystories", "val"))
    assert found == encoding().encode_ordinary_batch(val)


def test_shakespeare_is_split_as_in_nanogpt() -> None:
    """By characters, 90 to 10; with gpt2 both parts begin with the end-of-text token."""
    asset = Path(prepare.__file__).parent / "text" / "assets" / "shakespeare.txt.gz"
    text = gzip.decompress(asset.read_bytes()).decode()
    assert 1_000_000 < len(text) < 1_100_000
    cut = int(len(text) * 0.9)
    assert run("shakespeare", "--tokenizer", "char") == 0
    characters = sorted(set(text))
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert tokens("data/shakespeare-char", split) == [characters.index(c) for c in part]
    dataset = open_dataset("data/shakespeare-char")
    assert (dataset.tokenizer.name, dataset.tokenizer.eot_id) == ("char", None)
    assert run("shakespeare") == 0
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert tokens("data/shakespeare", split) == [EOT, *encoding().encode_ordinary(part)]


def test_characters_are_counted_not_bytes(tmp_path: Path) -> None:
    text = "語é🙂x" * 25_000 + "end"
    (tmp_path / "x.txt").write_text(text)
    command = ["tinyshakespeare", "--source", "x.txt", "--tokenizer", "char"]
    for fraction in (0.1, 0.25, 0.99, 0.5):
        assert run(*command, "--val-fraction", fraction, "--out", f"o{fraction}") == 0
        cut = int(len(text) * (1 - fraction))
        decode = open_dataset(f"o{fraction}").tokenizer.decode
        assert decode(tokens(f"o{fraction}")) == text[:cut]
        assert decode(tokens(f"o{fraction}", "val")) == text[cut:]


def test_a_giant_document_has_the_ids_of_the_whole(tmp_path: Path) -> None:
    """Several megabytes without a separator, with stretches that have no white space."""
    generator = random.Random(1)
    parts = [" ".join(stories(300, seed)) for seed in range(12)]
    parts += [
        "x1" * 200_000,
        "語、" * 150_000,
        "".join(map(chr, generator.choices(range(33, 127), k=400_000))),
    ]
    text = "\n\n   \n".join(parts)
    (tmp_path / "x.txt").write_text(text)
    write_parquet(tmp_path / "x.parquet", [text, "next"])
    expected = [EOT, *encoding().encode_ordinary(text)]
    assert run("text", "x.txt", "--val-fraction", 0) == 0
    assert tokens("data/text") == expected
    assert run("parquet", "x.parquet", "--val-fraction", 0, "--workers", 2) == 0
    assert tokens("data/parquet") == [*expected, EOT, *encoding().encode_ordinary("next")]


# --- tokenizers made from the text ---------------------------------------------------------------


def test_char_has_end_of_text_for_several_documents(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\nthree\n")
    assert run("text", "x.txt", "--split", "lines", "--tokenizer", "char") == 0
    dataset = open_dataset("data/text-char")
    assert dataset.tokenizer.eot_id == dataset.tokenizer.vocab_size - 1
    assert (
        dataset.tokenizer.decode(tokens("data/text-char")) == f"{END_OF_TEXT}one{END_OF_TEXT}three"
    )
    assert dataset.tokenizer.decode(tokens("data/text-char", "val")) == f"{END_OF_TEXT}two"


def test_bpe_is_trained_on_the_text(tmp_path: Path) -> None:
    documents = stories(200)
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    command = ["jsonl", "x.jsonl", "--tokenizer", "bpe", "--vocab-size", 400]
    assert run(*command, "--val-fraction", 0) == 0
    dataset = open_dataset("data/jsonl-bpe")
    assert (dataset.tokenizer.name, dataset.tokenizer.vocab_size) == ("bpe", 400)
    ids, eot = tokens("data/jsonl-bpe"), dataset.tokenizer.eot_id
    starts = [index for index, token in enumerate(ids) if token == eot]
    ends = [*starts[1:], len(ids)]
    found = [ids[start + 1 : end] for start, end in zip(starts, ends, strict=True)]
    assert found == [dataset.tokenizer.encode(document) for document in documents]
    assert [dataset.tokenizer.decode(document) for document in found] == documents
    # The trained tokenizer serves other data sets.
    (tmp_path / "y.txt").write_text("isn't the cat")
    flags = ["--tokenizer", "data/jsonl-bpe", "--val-fraction", 0]
    assert run("text", "y.txt", *flags) == 0
    assert tokens("data/text-bpe") == [eot, *dataset.tokenizer.encode("isn't the cat")]


def test_a_foreign_char_tokenizer_names_the_character(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abc")
    (tmp_path / "y.txt").write_text("abcd")
    run("text", "x.txt", "--tokenizer", "char", "--val-fraction", 0)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=r"character 'd' .* is not among the 3 characters"):
        run("text", "y.txt", "--tokenizer", "data/text-char", "--out", "y")
    assert snapshot(tmp_path) == before


# --- determinism, kills, resumption --------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some megabytes: enough for several chunks, in files of two kinds."""
    place = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        text = f"\n{END_OF_TEXT}\n".join(stories(3000, number))
        (place / f"{number}.txt").write_text(text)
    (place / "3.txt").write_text("a long one, " * 200_000)
    return place


FLAGS = ["--split", "eot", "--val-fraction", "0.1", "--shard-tokens", "200k"]


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "out"
    run("text", corpus, *FLAGS, "--workers", 1, "--out", out)
    assert len(list(out.glob("*_train_*.bin"))) > 5
    assert len(list(out.glob("*_val_*.bin"))) > 1
    return snapshot(out)


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_do_not_matter(
    workers: int, corpus: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    run("text", corpus, *FLAGS, "--workers", workers, "--out", "out")
    assert snapshot(tmp_path / "out") == reference


def start_prepare(*arguments: object) -> subprocess.Popen[str]:
    """A process that notes its progress as often as it can."""
    code = (
        "from gpt_dist.data.preparation import run; from gpt_dist.errors import run_main\n"
        "from gpt_dist.prepare import main; run.COMMIT_SECONDS = 0; run_main(main)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def documents_done(directory: Path) -> int:
    """How far the journal is."""
    try:
        return int(json.loads((directory / "prepare.journal").read_text())["cursor"][2])
    except FileNotFoundError:
        return 0


def refused(directory: Path) -> bool:
    """Whether readers do not take a directory for a data set."""
    try:
        open_dataset(directory)
    except GptDistError:
        return True
    return False


def test_killed_again_and_again(corpus: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL at moments that journal entries make sure to be in the middle of the work."""
    out = tmp_path / "out"
    kills, resumed, seen = 0, 0, 0
    for workers in (1, 2, 3, 1, 2, 3, 1, 2):
        process = start_prepare("text", corpus, *FLAGS, "--workers", workers, "--out", out)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            documents = documents_done(out)
            if documents > seen + 500:
                seen = documents
                break
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        resumed += "going on after" in errors
        if process.returncode == 0:
            break
        assert refused(out)
    else:
        process = start_prepare("text", corpus, *FLAGS, "--out", out)
        assert process.wait(60) == 0, process.communicate()
        resumed += 1
    assert kills >= 3
    assert resumed >= 2
    assert snapshot(out) == reference


def crash_at(number: int, *arguments: object) -> int:
    """Prepare in a forked child that dies before its n-th fsync, rename or removal of a file."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        calls = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        preparation.COMMIT_SECONDS = 0
        os._exit(run(*arguments))
    except BaseException:
        os._exit(3)


def test_dying_at_every_step_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each fsync, rename and removal in turn; then the same command completes the data set."""
    monkeypatch.setattr(tokenize_pool, "CHUNK_CHARACTERS", 1 << 13)
    text = f"\n{END_OF_TEXT}\n".join(stories(100))
    (tmp_path / "x.txt").write_text(text)
    command = ["text", "x.txt", *FLAGS[:4], "--shard-tokens", "9k", "--workers", 1]
    run(*command, "--out", "whole")
    expected = snapshot(tmp_path / "whole")
    number, crashes = 0, 0
    while True:
        number += 1
        out = f"out{number}"
        status = crash_at(number, *command, "--out", out)
        if status == 0:
            break
        assert status == 9
        crashes += 1
        if (tmp_path / out / "dataset.json").exists():  # all was there, up to the tidying
            assert tokens(out) == tokens("whole")
        else:
            assert not (tmp_path / out).exists() or refused(tmp_path / out)
        run(*command, "--out", out)
        assert snapshot(tmp_path / out) == expected, number
    assert crashes > 30


def test_dying_while_overwriting(tmp_path: Path) -> None:
    """What is there is at each moment the old data set, the new one, or visibly none."""
    (tmp_path / "x.txt").write_text("\n".join(stories(40)))
    old = ["text", "x.txt", "--split", "lines", "--workers", 1]
    new = [*old, "--seed", 5, "--overwrite"]
    run(*new, "--out", "new")
    expected = open_dataset("new").fingerprint
    for number in range(1, 1000):
        out = f"out{number}"
        run(*old, "--out", out)
        before = open_dataset(out).fingerprint
        status = crash_at(number, *new, "--out", out)
        if status == 0:
            break
        assert status == 9
        if not refused(tmp_path / out):
            assert open_dataset(out).fingerprint in (before, expected)
            assert run("inspect", out) == 0
        run(*new, "--out", out)
        assert open_dataset(out).fingerprint == expected
    assert number > 15


# --- what is there already -----------------------------------------------------------------------


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


def test_an_unfinished_other_data_set(corpus: Path, tmp_path: Path) -> None:
    process = start_prepare("text", corpus, *FLAGS, "--out", "out")
    while documents_done(tmp_path / "out") == 0:
        time.sleep(0.005)
    with pytest.raises(GptDistError, match="out: another process is preparing data there"):
        run("text", corpus, *FLAGS, "--out", "out")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(UsageError, match=r"unfinished data set made with val_fraction = 0\.1, not"):
        run("text", corpus, "--split", "eot", "--out", "out")
    assert run("text", corpus / "0.txt", "--out", "out", "--overwrite") == 0
    assert run("inspect", "out") == 0


# --- bad input -----------------------------------------------------------------------------------


def command_line(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, perhaps on a disk with room for ``limit`` bytes."""

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # type: ignore[arg-type]

    command = [sys.executable, "-m", "gpt_dist.prepare", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, preexec_fn=small_disk if limit else None
    )


@pytest.mark.parametrize(
    ("content", "arguments", "status", "message"),
    [
        (b"", ["text", "x.txt"], 1, "x.txt: no text in it"),
        (b" \n\n", ["text", "x.txt", "--tokenizer", "char"], 1, "x.txt: no text in it"),
        (b"", ["text", "x.txt", "--tokenizer", "bpe"], 1, "x.txt: no text in it"),
        (b"abc\xffdef", ["text", "x.txt"], 1, "x.txt: not UTF-8: byte 3 is 0xff"),
        (b"{", ["jsonl", "x.txt"], 1, "x.txt: line 1: Expecting property name"),
        (b"abc", ["parquet", "x.txt"], 1, "x.txt: cannot be read as parquet"),
        (b"abc", ["text", "y.txt"], 2, "y.txt: no such file or directory"),
        (b"abc", ["text", "*.md"], 2, "*.md: no file matches this pattern"),
        (b"abc", ["jsonl", "."], 2, ".: no files with names in .jsonl, .ndjson, .json"),
        (b"abc", ["text"], 2, "text: name at least one file, directory or pattern"),
        (b"abc", ["text", "x.txt", "--tokenizer", "gpt3"], 2, "tokenizer gpt3: no such tokenizer"),
        (b"abc", ["text", "x.txt", "--vocab-size", "9"], 2, "only for --tokenizer bpe"),
        (
            b"abc",
            ["text", "x.txt", "--tokenizer", "bpe", "--vocab-size", "70000"],
            2,
            "--vocab-size 70000: valid are 258",
        ),
        (b"abc", ["text", "x.txt", "--val-fraction", "1"], 2, "--val-fraction 1.0: valid are 0"),
        (b"abc", ["text", "x.txt", "--workers", "0"], 2, "--workers 0: valid are 1"),
        (b"abc", ["text", "x.txt", "--shard-tokens", "many"], 2, "'many' is not a number of tok"),
        (b"abc", ["text", "x.txt", "--shards", "3"], 2, "unrecognized arguments: --shards 3"),
        (b"abc", ["fineweb", "--variant", "10BT"], 2, "--variant 10BT: valid are sample-10BT"),
        (b"abc", ["nonsense"], 2, "invalid choice: 'nonsense'"),
        (b"abc", ["inspect", "nowhere"], 2, "nowhere: no data there; make it with"),
        (b"abc", ["text", "x.txt", "--out", "/proc/x/y"], 1, "/proc/x"),
    ],
)
def test_bad_input(
    content: bytes, arguments: list[str], status: int, message: str, tmp_path: Path
) -> None:
    """One line, the right status, no traceback, and nothing on disk is changed."""
    (tmp_path / "x.txt").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    done = command_line(*arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("word " * 100_000)
    done = command_line("text", "x.txt", "--out", "deep/out", limit=50_000)
    assert done.returncode == 1
    assert done.stderr == "error: File too large: deep/out/text_train_000000.bin\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.txt"]


def test_what_is_done_is_kept_when_a_later_file_is_bad(
    corpus: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "in"
    place.mkdir()
    for file in corpus.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    good = (place / "3.txt").read_bytes()
    (place / "3.txt").write_bytes(good[:2_000_000] + b"\xff" + good[2_000_001:])
    process = start_prepare("text", place, *FLAGS, "--out", "out")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "3.txt: not UTF-8: byte 2,000,000 is 0xff" in errors
    assert "documents are done and kept; the same command goes on from there" in errors
    assert refused(tmp_path / "out")
    (place / "3.txt").write_bytes(good)
    run("text", place, *FLAGS, "--out", "out")
    assert snapshot(tmp_path / "out") == reference


# --- from a mirror, end to end -------------------------------------------------------------------


def test_fineweb_from_a_mirror_of_the_hub(tmp_path: Path) -> None:
    """Listed, fetched over a breaking connection, tokenised; then found to be there, offline."""
    documents = stories(300)
    hub_layout(tmp_path / "web/datasets/HuggingFaceFW/fineweb-edu", documents, "sample/10BT")
    with serve(tmp_path / "web") as server:
        server.cut_after = [9000]
        assert run("fineweb-edu", "--source", server.url, "--val-fraction", 0) == 0
    out = "data/fineweb-edu-sample-10BT"
    assert split_documents(tokens(out)) == encoding().encode_ordinary_batch(documents)
    kept = list(Path("data/downloads").rglob("*.parquet"))
    assert len(kept) == len({wanted[0] for wanted in server.requests}) == 2
    assert run("fineweb-edu", "--source", server.url, "--val-fraction", 0) == 0
    # The downloads are laid out as on the hub: they serve as a local source.
    again = ["--source", "data/downloads/fineweb-edu", "--val-fraction", 0, "--out", "again"]
    assert run("fineweb-edu", *again) == 0
    assert open_dataset("again").fingerprint == open_dataset(out).fingerprint


def test_tinystories_from_a_mirror_of_the_hub(tmp_path: Path) -> None:
    place = tmp_path / "web/datasets/roneneldan/TinyStories"
    place.mkdir(parents=True)
    for variant in ("V2-GPT4-", "-"):
        for number, part in enumerate(("train", "valid")):
            documents = stories(20, seed=number + 2 * (variant == "-"))
            (place / f"TinyStories{variant}{part}.txt").write_text(END_OF_TEXT.join(documents))
    with serve(tmp_path / "web") as server:
        assert run("tinystories", "--source", server.url) == 0
        assert run("tinystories", "--source", server.url, "--variant", "v1") == 0
        file = f"{server.url}/datasets/roneneldan/TinyStories/TinyStories-train.txt"
        assert run("text", file, "--split", "eot", "--val-fraction", 0) == 0
    for out, seed in (("data/tinystories", 0), ("data/tinystories-v1", 2), ("data/text", 2)):
        expected = encoding().encode_ordinary_batch(stories(20, seed=seed))
        assert split_documents(tokens(out)) == expected


# --- inspect, help, memory -----------------------------------------------------------------------


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


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['prepare', *sys.argv[1:]]\n"
        "from gpt_dist.prepare import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'tiktoken', 'datasets', 'pyarrow', 'tokenizers', 'rich', 'requests'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    for arguments in ([], ["fineweb-edu"], ["text"], ["inspect"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--help"], capture_output=True, text=True
        )
        assert "heavy: []" in done.stdout
        assert "usage: gpt_dist.prepare" in done.stdout


def test_memory_is_bounded(tmp_path: Path) -> None:
    """60 MB, one document, no separators; the figures for 5 GB are in benchmarks/data.py."""
    with (tmp_path / "x.txt").open("w") as file:
        for number in range(2_500_000):
            file.write(f"{number} some more words\n")
    code = (
        "from gpt_dist import prepare; prepare.main()\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "text", "x.txt", "--workers", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 250_000, "kB"
