"""What the tests of ``prepare`` share: documents, references, and the command in many forms."""

from __future__ import annotations

import hashlib
import random
import resource
import select
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from gpt_dist import prepare
from gpt_dist.data.dataset import open_dataset
from gpt_dist.errors import GptDistError
from gpt_dist.text.gpt2_vocabulary import merge_ranks
from gpt_dist.text.tokenizers import END_OF_TEXT

EOT = 50256
DEADLINE = 300.0
"""Seconds of silence after which a process counts as hung."""

FLAGS = ["--split", "eot", "--val-fraction", "0.1", "--shard-tokens", "200k"]


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


def write_parquet(path: Path, documents: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(documents)), column: documents})
    pq.write_table(table, path, row_group_size=37)


def hub_layout(place: Path, documents: list[str], folder: str) -> None:
    write_parquet(place / folder / "000_00000.parquet", documents[:150])
    write_parquet(place / folder / "001_00000.parquet", documents[150:])


def refused(directory: Path) -> bool:
    """Whether a directory is refused as a data set."""
    try:
        open_dataset(directory)
    except GptDistError:
        return True
    return False


def command_line(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, perhaps on a disk with room for ``limit`` bytes."""

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # type: ignore[arg-type]

    command = [sys.executable, "-m", "gpt_dist.prepare", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, preexec_fn=small_disk if limit else None
    )


STEPWISE = """
import sys
from gpt_dist.data.preparation import run
from gpt_dist.data.preparation.shard_writing import DatasetWriter
from gpt_dist.errors import run_main
from gpt_dist.prepare import main

def stepwise(self, cursor, commit=DatasetWriter.commit):
    commit(self, cursor)
    print("documents:", cursor.documents, flush=True)
    sys.stdin.readline()

run.COMMIT_SECONDS = 0
DatasetWriter.commit = stepwise
run_main(main)
"""


def start_prepare(*arguments: object) -> subprocess.Popen[str]:
    """The command; it stops at each entry in the journal until ``step`` is called.

    Once its standard input is closed (``communicate`` does that) it runs to its end.
    """
    command = [sys.executable, "-c", STEPWISE, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def journal_entry(process: subprocess.Popen[str]) -> int | None:
    """Wait for the next journal entry; returns its documents, None at the end of the work."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], DEADLINE)
    assert ready, f"no journal entry in {DEADLINE} s"
    line = process.stdout.readline()
    return int(line.removeprefix("documents:")) if line.startswith("documents:") else None


def step(process: subprocess.Popen[str]) -> None:
    """Continue after a journal entry."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
