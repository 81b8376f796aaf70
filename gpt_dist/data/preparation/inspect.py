"""Verify a data set and show what is in it: ``python -m gpt_dist.prepare inspect DIR``."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gpt_dist.data.dataset import Dataset, open_dataset
from gpt_dist.data.preparation.shard_writing import fingerprint
from gpt_dist.data.preparation.validation import RULES
from gpt_dist.data.shards import TokenStream
from gpt_dist.errors import GptDistError
from gpt_dist.files import file_sha256

BLOCK_TOKENS = 1 << 24
SAMPLE_TOKENS = 64


def inspect(directory: Path) -> int:
    """Print counts, problems and a decoded sample; returns 1 if there are problems.

    Raises:
        UsageError: no data set there.
        GptDistError: a shard is missing, truncated or not a shard.
    """
    dataset = open_dataset(directory)
    vocabulary = dataset.tokenizer
    eot = "none" if vocabulary.eot_id is None else vocabulary.eot_id
    print(f"{directory}")
    print(
        f"  tokenizer    {vocabulary.name}, vocabulary of {vocabulary.vocab_size:,}, "
        f"end-of-text token {eot}"
    )
    print(f"  fingerprint  {dataset.fingerprint}")
    if dataset.info:
        print(f"  source       {_origin(dataset.info)}")
    if rule := dataset.info.get("validation"):
        print(f"  validation   {RULES.get(rule, rule)}")
    problems = _checksum_problems(dataset) if dataset.info else []
    for split in ("train", "val"):
        stream = dataset.split(split)  # type: ignore[arg-type]
        if stream is None:
            print(f"  {split:11}  none")
            continue
        documents, found = _look_through(stream, vocabulary.eot_id)
        problems += found
        told = dataset.info.get("splits", {}).get(split, {})
        print(
            f"  {split:11}  {len(stream):,} tokens in {len(stream.paths)} shard(s), "
            f"{documents if vocabulary.eot_id is not None else told.get('documents', 1):,} "
            "document(s)" + (f", {told['bytes']:,} bytes of text" if told else "")
        )
        if told and vocabulary.eot_id is not None and documents != told["documents"]:
            problems.append(f"{split}: {documents:,} documents, not {told['documents']:,}")
        if not found:
            ids = stream.read(0, min(SAMPLE_TOKENS, len(stream)))
            print(f"  begins with  {vocabulary.decode(ids.tolist())!r}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print("  all checks passed" if dataset.info else "  sizes and ids are valid (no checksums)")
    return 1 if problems else 0


def _origin(info: dict[str, Any]) -> str:
    """What the data set was made from, as far as it was recorded."""
    arguments = info.get("arguments", {})
    source = arguments.get("name") or info.get("source", "unknown")
    if "commit" in arguments:
        return f"{source} at commit {arguments['commit']}"
    files = [*arguments.get("urls", []), *filter(None, [arguments.get("content")])]
    return f"{source}: {', '.join(files)}" if files else str(source)


def _checksum_problems(dataset: Dataset) -> list[str]:
    """Shards, tokenizer or fingerprint that differ from ``dataset.json``."""
    problems = []
    for entry in dataset.info["splits"].values():
        for shard in entry["shards"]:
            path = dataset.directory / shard["file"]
            if file_sha256(path) != shard["sha256"]:
                problems.append(f"{path}: damaged (sha256 differs)")
    tokenizer = hashlib.sha256(dataset.tokenizer.to_json().encode()).hexdigest()
    if tokenizer != dataset.info["tokenizer"]["sha256"]:
        problems.append(f"{dataset.directory}/tokenizer.json: not the tokenizer of this data set")
    elif fingerprint(tokenizer, dataset.info["splits"]) != dataset.fingerprint:
        problems.append(f"{dataset.directory}/dataset.json: the fingerprint is not of these shards")
    return problems


def _look_through(stream: TokenStream, eot: int | None) -> tuple[int, list[str]]:
    """The number of end-of-text tokens, and a problem if an id is beyond the vocabulary."""
    documents = 0
    for start in range(0, len(stream), BLOCK_TOKENS):
        try:
            block = stream.read(start, min(BLOCK_TOKENS, len(stream) - start))
        except GptDistError as error:
            return documents, [str(error)]
        if eot is not None:
            documents += int(np.count_nonzero(block == eot))
    return documents, []
