"""Texts for ``benchmarks/data.py``: documents, written as every kind of source."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from gpt_dist.text.gpt2_vocabulary import merge_ranks

END_OF_TEXT = "<|endoftext|>"
SEPARATOR = f"\n{END_OF_TEXT}\n"
EOT = 50256


def read_documents(path: str | None) -> list[str]:
    """The documents of a file, or 20 MB of generated ones."""
    if path is None:
        return list(made_up(20_000_000))
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
    return [document.strip() for document in text.split(END_OF_TEXT) if document.strip()]


def made_up(characters: int) -> Iterator[str]:
    """Articles in an invented language: Zipf-distributed words, sentences, paragraphs, numbers."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvw" for b in ("a", "e", "i", "o", "u", "ar", "in")]
    words = [
        "".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(30_000)
    ]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    while characters > 0:
        paragraphs = [generator.choice(words).title()]
        for _ in range(generator.randint(1, 12)):
            chosen = generator.choices(words, weights, k=generator.randint(20, 150))
            for index in range(0, len(chosen), generator.randint(7, 19)):
                chosen[index] = f"{chosen[index]}. {generator.choice(words).title()}"
            chosen[-1] = f"in {generator.randint(1, 2026)}, naïve café."
            paragraphs.append(" ".join(chosen))
        article = "\n\n".join(paragraphs)
        yield article
        characters -= len(article)


def first(documents: list[str], wanted: int) -> list[str]:
    """Documents of about ``wanted`` bytes in total, repeated if there are too few."""
    found: list[str] = []
    while True:
        for document in documents:
            found.append(document)
            wanted -= len(document.encode()) + len(SEPARATOR)
            if wanted <= 0:
                return found


@cache
def reference() -> tiktoken.Encoding:
    """tiktoken's r50k_base, with the bundled merge table instead of a download."""
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "r50k_base",
        pat_str=r50k_pat_str,
        mergeable_ranks=merge_ranks(),
        special_tokens={END_OF_TEXT: EOT},
    )


def write_parquet(path: Path, documents: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: documents}), path, row_group_size=1000, compression="zstd")


def written_as(documents: list[str], place: Path) -> dict[str, tuple[list[object], list[str]]]:
    """Write the documents as every kind of source.

    Returns:
        By kind: the arguments of ``prepare``, and the documents it must find.
    """
    lines = [" ".join(document.split()) for document in documents]
    half = len(documents) // 2
    (place / "eot.txt").write_text(SEPARATOR.join(documents))
    (place / "lines.txt").write_text("\n".join(lines))
    (place / "files").mkdir()
    for number, document in enumerate(documents[:500]):
        (place / "files" / f"{number:06}.txt").write_text(document)
    rows = [json.dumps({"text": document}) for document in documents]
    (place / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode(), 1))
    write_parquet(place / "x.parquet", documents, "content")
    for folder in ("fineweb/sample/10BT", "fineweb/data/CC-MAIN-2024-10"):
        write_parquet(place / folder / "000_00000.parquet", documents[:half])
        write_parquet(place / folder / "001_00000.parquet", documents[half:])
    write_parquet(place / "hub" / "train-00000-of-00001.parquet", documents)
    stories = place / "stories" / "TinyStoriesV2-GPT4-train.txt"
    stories.parent.mkdir()
    stories.write_text(SEPARATOR.join(documents))
    write_parquet(place / "stories2" / "train-00000-of-00001.parquet", documents)
    (place / "whole.txt").write_text(SEPARATOR.join(documents))
    whole = [(place / "whole.txt").read_text()]
    return {
        "text --split eot": (["text", place / "eot.txt", "--split", "eot"], documents),
        "text --split lines": (["text", place / "lines.txt", "--split", "lines"], lines),
        "text --split files": (["text", place / "files"], documents[:500]),
        "text, one document": (["text", place / "whole.txt"], whole),
        "tinyshakespeare": (["tinyshakespeare", "--source", place / "whole.txt"], whole),
        "shakespeare": (["shakespeare", "--source", place / "whole.txt"], whole),
        "jsonl": (["jsonl", place / "x.jsonl.gz"], documents),
        "parquet": (["parquet", place / "x.parquet", "--column", "content"], documents),
        "fineweb-edu": (["fineweb-edu", "--source", place / "fineweb"], documents),
        "fineweb, a dump": (
            ["fineweb", "--variant", "CC-MAIN-2024-10", "--source", place / "fineweb"],
            documents,
        ),
        "tinystories, text": (["tinystories", "--source", place / "stories"], documents),
        "tinystories, parquet": (["tinystories", "--source", place / "stories2"], documents),
        "hf": (["hf", place / "hub"], documents),
    }


def write_large(path: Path, documents: list[str], wanted: int, separator: str | None) -> None:
    """Write ``wanted`` bytes of text by repeating the documents."""
    if path.suffix == ".parquet":
        schema = pa.schema({"text": pa.string()})
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while wanted > 0:
                part = first(documents, min(wanted, 200_000_000))
                table = pa.table({"text": part})
                writer.write_table(table, row_group_size=len(part))  # unusually large row groups
                wanted -= table.nbytes
        return
    whole = ((separator or SEPARATOR).join(documents) + (separator or SEPARATOR)).encode()
    with path.open("wb") as file:
        while wanted > 0:
            file.write(whole[: wanted + 1000].decode(errors="ignore").encode())
            wanted -= len(whole)
