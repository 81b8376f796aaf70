"""Preparing data: the ids equal tiktoken's for every source, and memory stays bounded."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt_dist import prepare
from gpt_dist.config.command_line import build
from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.loader import IGNORE, open_datasets, validation_batches
from gpt_dist.data.order import TrainingData
from gpt_dist.data.preparation import documents, readers
from gpt_dist.errors import UsageError
from gpt_dist.text import cuts
from gpt_dist.text.tokenizers import END_OF_TEXT
from tests.data.helpers import (
    EOT,
    encoding,
    hub_layout,
    run,
    snapshot,
    split_documents,
    stories,
    tokens,
    write_parquet,
)
from tests.text.test_cuts import foreign

pytestmark = pytest.mark.usefixtures("in_tmp_path")


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


def text_compressed(place: Path, documents: list[str]) -> list[object]:
    (place / "x.txt.gz").write_bytes(gzip.compress(END_OF_TEXT.join(documents).encode()))
    return ["text", f"{place}/*.gz", "--split", "eot"]


def jsonl(place: Path, documents: list[str]) -> list[object]:
    rows = [json.dumps({"id": n, "body": text}) for n, text in enumerate(documents)]
    (place / "a.jsonl").write_text("\n".join(rows[:100]))
    (place / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[100:]).encode()))
    return ["jsonl", place, "--field", "body"]


def parquet(place: Path, documents: list[str]) -> list[object]:
    write_parquet(place / "x.parquet", documents, "content")
    return ["parquet", place / "x.parquet", "--column", "content"]


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
    text_eot, text_lines, text_files, text_compressed, jsonl, parquet, fineweb, fineweb_dump,
    tinystories_file, hf,
]  # fmt: skip


@pytest.mark.slow(5)
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


@pytest.mark.slow(2)
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


@pytest.mark.slow
def test_a_giant_document_has_the_ids_of_the_whole(tmp_path: Path) -> None:
    """Several megabytes without a separator, in part without white space."""
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


def test_more_tokens_than_16_bits_hold(tmp_path: Path) -> None:
    """From the text to the batches of training and validation."""
    characters = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    text = characters + characters[::-1]
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    assert run("text", "x.txt", "--tokenizer", "char", "--shard-tokens", "50k") == 0
    cut = int(len(text) * 0.99)
    order = {character: token for token, character in enumerate(sorted(set(text)))}
    expected = [order[character] for character in text]
    assert tokens("data/text-char") == expected[:cut]
    assert tokens("data/text-char", "val") == expected[cut:]
    assert max(expected) > 65535
    assert run("inspect", "data/text-char") == 0
    settings = {
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 16},
        "data": {"path": "data/text-char", "shuffle": "none"},
        "train": {"batch_tokens": 16 * 4, "micro_batch_size": 4},
    }
    config = build(settings)
    (dataset,) = open_datasets(config)
    rows = TrainingData(config, [dataset]).sequences(np.arange(4000))
    assert rows.tolist() == [expected[i : i + 17] for i in range(0, 4000 * 16, 16)]
    stream = dataset.split("val")
    assert stream is not None
    (batch,) = validation_batches(
        stream, context=16, tokens=None, micro_batch=1000, rank=0, world_size=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    flat = batch.targets.flatten()
    assert flat[flat != IGNORE].tolist() == expected[cut + 1 :]


@pytest.mark.slow(2)
@pytest.mark.parametrize("kind", ["cl100k", "no pattern", "added token"])
@pytest.mark.parametrize("command", ["text", "jsonl"])
def test_a_foreign_tokenizers_long_documents_have_the_ids_of_the_whole(
    kind: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are cut where its pre-tokenizer allows it, or not at all."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 2000)
    monkeypatch.setattr(readers, "PIECE_BYTES", 2000)
    monkeypatch.setattr(cuts, "LOOKAHEAD", 200)
    tokenizer = foreign(kind)
    tokenizer.save(tmp_path)
    generator = random.Random(5)
    bits = ["(hello)", "12345", "!\n", " ", "Mr. X", "語、", "don't", "\n\n", "#", "ab"]
    texts = ["x" + "".join(generator.choices(bits, k=size)) + "x" for size in (8000, 3, 5000)]
    if command == "text":
        (tmp_path / "x.txt").write_text(f"\n{END_OF_TEXT}\n".join(texts))
        flags = ["x.txt", "--split", "eot"]
    else:
        rows = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / "x.jsonl").write_text(rows)
        flags = ["x.jsonl"]
    flags += ["--tokenizer", "tokenizer.json", "--val-fraction", 0, "--out", "out"]
    assert run(command, *flags) == 0
    expected = [token for text in texts for token in (tokenizer.eot_id, *tokenizer.encode(text))]
    assert tokens("out") == expected


def test_a_foreign_char_tokenizer_names_the_character(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abc")
    (tmp_path / "y.txt").write_text("abcd")
    run("text", "x.txt", "--tokenizer", "char", "--val-fraction", 0)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=r"character 'd' .* is not among the 3 characters"):
        run("text", "y.txt", "--tokenizer", "data/text-char", "--out", "y")
    assert snapshot(tmp_path) == before


@pytest.mark.slow
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


@pytest.mark.slow
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
