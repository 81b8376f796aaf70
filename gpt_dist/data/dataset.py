"""A directory of token shards that makes a data set.

    dataset = open_dataset("data/shakespeare")
    train = dataset.split("train")

``dataset.json`` beside the shards names the tokenizer and the checksums; without it, llm.c's own
shards work as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gpt_dist.data.catalog import prepare_command
from gpt_dist.data.shards import HEADER_BYTES, TokenStream, read_shard
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.text.tokenizers import FILE_NAME, Tokenizer, load_tokenizer

DATASET_FILE = "dataset.json"
JOURNAL_FILE = "prepare.journal"
"""Present while a data set is being written (see preparation/shard_writing.py)."""
DATASET_FORMAT_VERSION = 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Format version → function that makes the next version of a ``dataset.json`` or a journal.

When a key, source or tokenizer changes its name, add a function here and raise the version by one.
"""

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: shards, their tokenizer and what is known about them."""

    directory: Path
    tokenizer: Tokenizer
    info: dict[str, Any]
    """``dataset.json``; empty for shards that have none."""
    shards: dict[str, list[Path]]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the tokens and their order; the same for copies of a data set."""
        if self.info:
            return str(self.info["fingerprint"])
        digest = hashlib.sha256(self.tokenizer.to_json().encode())
        for split, paths in sorted(self.shards.items()):
            for path in paths:
                with path.open("rb") as file:
                    digest.update(split.encode() + file.read(HEADER_BYTES))
                digest.update(path.stat().st_size.to_bytes(8, "little"))
        return digest.hexdigest()

    def split(self, name: Split) -> TokenStream | None:
        """The token stream of ``train`` or ``val``; None where the data set has no such split.

        Raises:
            GptDistError: a shard is missing or damaged.
        """
        paths = self.shards.get(name)
        return TokenStream(paths, self.tokenizer.vocab_size) if paths else None


def open_dataset(directory: str | os.PathLike[str], tokenizer_name: str = "gpt2") -> Dataset:
    """Open a directory of token shards.

    Args:
        tokenizer_name: of shards without ``dataset.json``, which otherwise names it.

    Raises:
        UsageError: no data there; the message has the command that makes it.
        GptDistError: an unfinished or damaged data set.
    """
    directory = Path(directory)
    if (directory / DATASET_FILE).exists():
        info = read_dataset_file(directory)
        shards = {
            split: [directory / shard["file"] for shard in entry["shards"]]
            for split, entry in info["splits"].items()
        }
        for split, entry in info["splits"].items():
            for path, shard in zip(shards[split], entry["shards"], strict=True):
                if len(read_shard(path)) != shard["tokens"]:
                    raise GptDistError(
                        f"{path}: holds {len(read_shard(path)):,} tokens, but {DATASET_FILE} "
                        f"says {shard['tokens']:,}"
                    )
        return Dataset(directory, load_tokenizer(directory / FILE_NAME), info, shards)
    if (directory / JOURNAL_FILE).exists():
        raise GptDistError(
            f"{directory}: not finished (no {DATASET_FILE}); run the same prepare command again "
            "to resume it"
        )
    shards = {"train": [], "val": []}
    for path in sorted(directory.glob("*.bin")):
        # In a name such as my_val_train_000.bin the last word counts.
        train, val = path.name.rfind("_train"), path.name.rfind("_val")
        if train >= 0 or val >= 0:
            shards["train" if train > val else "val"].append(path)
    if not shards["train"] and not shards["val"]:
        raise UsageError(f"{directory}: no data there; make it with: {prepare_command(directory)}")
    return Dataset(directory, load_tokenizer(tokenizer_name), {}, shards)


def migrated(info: dict[str, Any]) -> dict[str, Any]:
    """A ``dataset.json`` or journal of an older format version as one of the current version."""
    while info["format_version"] in MIGRATIONS:
        info = MIGRATIONS[info["format_version"]](info)
    return info


def read_dataset_file(directory: Path) -> dict[str, Any]:
    """``dataset.json`` of a data set.

    Raises:
        GptDistError: damaged, or of another format version.
    """
    path = directory / DATASET_FILE
    try:
        info = migrated(json.loads(path.read_bytes()))
        version = info["format_version"]
        complete = all(
            isinstance(shard["file"], str) and isinstance(shard["tokens"], int)
            for split in info["splits"].values()
            for shard in split["shards"]
        )
        complete = complete and isinstance(info["fingerprint"], str)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise GptDistError(f"{path}: damaged; prepare the data set again") from None
    if version != DATASET_FORMAT_VERSION or not complete:
        raise GptDistError(
            f"{path}: format_version {version!r}; this version reads {DATASET_FORMAT_VERSION}"
        )
    return info
