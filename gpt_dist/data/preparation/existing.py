"""What an earlier ``prepare`` left in a directory: a data set, a part of one, or neither."""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_dist.data.dataset import DATASET_FILE, JOURNAL_FILE, open_dataset, read_dataset_file
from gpt_dist.data.preparation.shard_writing import read_journal, remove_journal
from gpt_dist.data.preparation.sources import Source
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.files import needing_directory
from gpt_dist.text.tokenizers import Tokenizer


@contextmanager
def own_directory(out: Path) -> Iterator[None]:
    """Make the directory and lock it against other writers; remove it if it stays empty.

    Raises:
        UsageError: it is a file.
        GptDistError: another process is writing there.
        OSError: it cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; --out names a directory")
    with needing_directory(out):
        if not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied", str(out))
        handle = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise GptDistError(f"{out}: another process is preparing data there") from None
        except OSError:  # some network file systems have no such locks
            pass
        try:
            yield
        finally:
            os.close(handle)


def essential_arguments(
    args: argparse.Namespace, given: Tokenizer | None, source: Source | None
) -> dict[str, Any]:
    """What determines the tokens of the data set, as flags and values.

    Args:
        given: the tokenizer, unless it is made from the text.
        source: None where only the hub can say what it is.
    """
    names = ["name", "subset", "hf_split", "field", "column", "variant", "revision", "split"]
    names += ["val_fraction", "shard_tokens", "seed"]
    names += ["vocab_size"] if args.tokenizer == "bpe" else []
    tokenizer = args.tokenizer
    if given is not None and given.name != "gpt2":
        tokenizer = f"{given.name} {hashlib.sha256(given.to_json().encode()).hexdigest()[:16]}"
    chosen = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return {
        "source": args.command,
        "tokenizer": tokenizer if given is None or given.name != "gpt2" else "gpt2",
        **chosen,
        **({"content": source.content} if source and source.content else {}),
        **({"urls": source.urls} if source and source.urls else {}),
        **({"commit": source.commit} if source and source.commit else {}),
    }


def found_complete(out: Path, arguments: dict[str, Any]) -> bool:
    """Whether the complete data set is there already; says so on standard output.

    Raises:
        UsageError: another data set is there.
        GptDistError: it is damaged.
    """
    if not (out / DATASET_FILE).exists():
        return False
    made = read_dataset_file(out).get("arguments", {})
    if differences := _differences(made, arguments):
        raise UsageError(
            f"{out}: holds a data set made with {differences}; "
            "choose another --out, or --overwrite it"
        )
    try:
        dataset = open_dataset(out)
        streams = [dataset.split("train"), dataset.split("val")]
    except GptDistError as error:
        raise GptDistError(f"{error}; --overwrite makes it again") from None
    if (out / JOURNAL_FILE).exists():
        remove_journal(out)  # a killed attempt may have left this to do
    tokens = sum(len(stream) for stream in streams if stream)
    print(f"{out}: is there already, with the same arguments ({tokens:,} tokens)")
    return True


def found_unfinished(out: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The journal of an interrupted attempt at the same data set; None where there is none.

    Raises:
        UsageError: the attempt was at another data set.
        GptDistError: the journal is damaged.
    """
    journal = read_journal(out)
    if journal is not None and (differences := _differences(journal["arguments"], arguments)):
        raise UsageError(
            f"{out}: holds an unfinished data set made with {differences}; "
            "choose another --out, or --overwrite it"
        )
    return journal


FILES = ("content", "urls")
"""Arguments that say which files were read."""


def _differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """``val_fraction = 0.1, not 0.05``; empty where all is the same."""
    # Older releases did not record the files, and those of the hub are unknown before it is asked.
    files_known = all(any(name in side for name in FILES) for side in (made, wanted))
    found = []
    for name in dict.fromkeys([*made, *wanted]):
        old, new = made.get(name), wanted.get(name)
        if old == new or name == "commit" or (name in FILES and not files_known):
            continue
        if name == "revision" and new is not None and new == made.get("commit"):
            continue
        found.append(f"{name} = {_shown(old, new)}, not {_shown(new, old)}")
    return " and ".join(found)


def _shown(value: Any, other: Any) -> str:
    """A value; of a list the first entry that the other does not have."""
    if isinstance(value, list):
        value = next((entry for entry in value if entry not in (other or [])), value[0])
    return "unset" if value is None else str(value)
