"""Turn text into token shards: ``python -m gpt_dist.prepare SOURCE``.

    python -m gpt_dist.prepare shakespeare --tokenizer char
    python -m gpt_dist.prepare fineweb-edu --variant sample-10BT
    python -m gpt_dist.prepare inspect data/shakespeare-char

Documents stream from the source through the tokenizer into shards; memory stays bounded. The same
command after a kill goes on where it stopped, and the shards depend neither on that nor on the
number of workers.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_dist.data.catalog import default_directory
from gpt_dist.data.preparation.options import parse
from gpt_dist.data.preparation.progress import WorkProgress
from gpt_dist.data.preparation.shard_writing import (
    DatasetWriter,
    read_journal,
    remove_data_set,
    remove_journal,
)
from gpt_dist.data.preparation.sources import (
    FileInput,
    Source,
    is_remote,
    open_source,
    split_by_characters,
)
from gpt_dist.data.preparation.tokenize_pool import Cursor, Input, read_chunks, tokenize
from gpt_dist.data.shards import DATASET_FILE, JOURNAL_FILE, Split, open_dataset, read_dataset_file
from gpt_dist.errors import GptDistError, UsageError, describe, run_main
from gpt_dist.files import needing_directory
from gpt_dist.text.tokenizers import BpeTokenizer, CharTokenizer, Tokenizer, load_tokenizer

COMMIT_SECONDS = 5.0
"""Between two entries in the journal: about what a kill can cost."""
BPE_TRAINING_CHARACTERS = 1 << 28
"""A BPE is trained on this much text from the beginning of the source."""


def main() -> int:
    args = parse(sys.argv[1:])
    if args.command == "inspect":
        from gpt_dist.data.preparation.inspect import inspect

        return inspect(Path(args.directory))
    given = None if args.tokenizer in ("char", "bpe") else load_tokenizer(args.tokenizer)
    kind = given.name if given else args.tokenizer
    out = Path(args.out or default_directory(args.command, args.variant, kind))
    prepare(args, given, out)
    return 0


def prepare(args: argparse.Namespace, given: Tokenizer | None, out: Path) -> None:
    """Make a data set, go on with an unfinished one, or find that it is there already.

    Args:
        args: of the command line.
        given: the tokenizer, where it need not be made from the text.
        out: directory of the data set.

    Raises:
        UsageError: the directory holds something else; a source is not there.
        GptDistError: the text or a download is not what it should be.
        OSError: a file cannot be written.
    """
    with WorkProgress("preparing") as progress:
        # Local files are looked at first: they are part of what was asked for.
        source = None if is_remote(args) else open_source(args, progress.say)
        arguments = essential_arguments(args, given, source)
        if not args.overwrite and found_complete(out, arguments):
            return
        with own_directory(out):
            if args.overwrite:
                remove_data_set(out)
            journal = found_unfinished(out, arguments)
            if journal is None and any(not path.name.startswith(".") for path in out.iterdir()):
                raise UsageError(f"{out}: not empty and no data set; choose another --out")
            source = source or open_source(args, progress.say)
            _write(args, given, source, arguments, out, journal, progress)


def _write(
    args: argparse.Namespace,
    given: Tokenizer | None,
    source: Source,
    arguments: dict[str, Any],
    out: Path,
    journal: dict[str, Any] | None,
    progress: WorkProgress,
) -> None:
    inputs: Sequence[Input] = source.inputs
    whole = source.inputs[0]
    if source.one_document and args.val_fraction and isinstance(whole, FileInput):
        inputs = split_by_characters(whole, args.val_fraction)
    begin = time.monotonic()
    writer = None
    try:
        if journal is not None:
            tokenizer = load_tokenizer(out)
        else:
            tokenizer = given or _make_tokenizer(args, source, inputs, progress)
        writer = DatasetWriter(out, arguments, tokenizer, args.shard_tokens, journal)
        if journal is not None:
            print(f"{out}: going on after {writer.cursor.documents:,} documents", file=sys.stderr)
        _tokenize_into(writer, inputs, args, progress)
        info = writer.finish()
    except BaseException as error:
        kept = _give_up(writer, journal)
        if kept and isinstance(error, (GptDistError, OSError)):
            wrapped = GptDistError(f"{describe(error)}\n{kept}")
            wrapped.exit_status = getattr(error, "exit_status", 1)
            raise wrapped from None
        if kept and isinstance(error, KeyboardInterrupt):
            print(kept, file=sys.stderr)
        raise
    _summary(out, info, time.monotonic() - begin)


def _tokenize_into(
    writer: DatasetWriter, inputs: Sequence[Input], args: argparse.Namespace, progress: WorkProgress
) -> None:
    """The work itself: read, tokenise, write, and note in the journal how far it is."""
    last_commit = time.monotonic()
    splits = writer.splits.values()
    chunks = read_chunks(inputs, writer.cursor, split_chooser(args.val_fraction, args.seed))
    for chunk, parts in tokenize(chunks, writer.tokenizer, args.workers):
        writer.write(parts)
        if chunk.after is not None and time.monotonic() - last_commit >= COMMIT_SECONDS:
            writer.commit(chunk.after)
            last_commit = time.monotonic()
        documents = sum(split.documents for split in splits)
        progress.update(chunk.done, documents, sum(split.tokens for split in splits))
    if not sum(split.tokens for split in splits):
        names = ", ".join(dict.fromkeys(source.name for source in inputs))
        raise GptDistError(f"{names[:200]}: no text in it")


def _make_tokenizer(
    args: argparse.Namespace, source: Source, inputs: Sequence[Input], progress: WorkProgress
) -> Tokenizer:
    """A first pass over the text, for tokenizers that are made from it."""
    documents = 0

    def texts() -> Iterator[str]:
        nonlocal documents
        for chunk in read_chunks(inputs, Cursor(), lambda index: "train"):
            for run in chunk.runs:
                yield from run.texts
                documents += sum(run.starts)
            progress.update(chunk.done, documents)

    progress.say(f"building the {args.tokenizer} vocabulary")
    if args.tokenizer == "char":
        characters: set[str] = set()
        for text in texts():
            characters |= set(text)
        if not characters:
            raise GptDistError(f"{source.inputs[0].name}: no text in it")
        return CharTokenizer(characters, eot=documents > 1 and not source.one_document)
    return BpeTokenizer.train(_first(texts(), BPE_TRAINING_CHARACTERS), args.vocab_size)


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def split_chooser(val_fraction: float, seed: int) -> Callable[[int], Split]:
    """Which split a document goes to: a hash of its index decides, so that it streams.

    The first document is always for training and, where there is validation at all, the second for
    validation, so that a handful of documents has both.
    """
    threshold = int(val_fraction * 2**64)

    def choose(index: int) -> Split:
        if threshold == 0 or index == 0:
            return "train"
        return "val" if index == 1 or _mix(index + (seed << 32)) < threshold else "train"

    return choose


def _mix(value: int) -> int:
    """SplitMix64 (Steele, Lea and Flood 2014): 64 well-mixed bits of an integer."""
    mask = 2**64 - 1
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


# --- what is there already -----------------------------------------------------------------------


@contextmanager
def own_directory(out: Path) -> Iterator[None]:
    """Make the directory and hold it against other writers; leave no empty one behind.

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
        except OSError:  # some network file systems know no such locks
            pass
        try:
            yield
        finally:
            os.close(handle)


def essential_arguments(
    args: argparse.Namespace, given: Tokenizer | None, source: Source | None
) -> dict[str, Any]:
    """What determines the tokens of the data set, as flags and values.

    The path of the source is not among them: a data set made from a mirror is the same.
    """
    names = ["name", "subset", "hf_split", "field", "column", "variant", "split", "val_fraction"]
    names += ["shard_tokens", "seed", *(["vocab_size"] if args.tokenizer == "bpe" else [])]
    tokenizer = args.tokenizer
    if given is not None and given.name != "gpt2":
        tokenizer = f"{given.name} {hashlib.sha256(given.to_json().encode()).hexdigest()[:16]}"
    chosen = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    content = source.content if source else None
    return {
        "source": args.command,
        "tokenizer": tokenizer if given is None or given.name != "gpt2" else "gpt2",
        **chosen,
        **({"content": content} if content else {}),
    }


def found_complete(out: Path, arguments: dict[str, Any]) -> bool:
    """Whether the very data set is there; says so.

    Raises:
        UsageError: another one is there.
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
        raise GptDistError(f"{error}; --overwrite makes the data set anew") from None
    if (out / JOURNAL_FILE).exists():
        remove_journal(out)  # the last thing that a killed attempt may have left to do
    tokens = sum(len(stream) for stream in streams if stream)
    print(f"{out}: is there already, with the same arguments ({tokens:,} tokens)")
    return True


def found_unfinished(out: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The journal of an earlier, interrupted attempt at the very data set.

    Raises:
        UsageError: it was another data set.
        GptDistError: the journal is damaged.
    """
    journal = read_journal(out)
    if journal is not None and (differences := _differences(journal["arguments"], arguments)):
        raise UsageError(
            f"{out}: holds an unfinished data set made with {differences}; "
            "choose another --out, or --overwrite it"
        )
    return journal


def _differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """``val_fraction = 0.1, not 0.05``; empty where all is the same."""
    found = []
    for name in dict.fromkeys([*made, *wanted]):
        # The content is known only where the files were at hand.
        if name == "content" and not (made.get(name) and wanted.get(name)):
            continue
        if made.get(name) != wanted.get(name):
            found.append(f"{name} = {made.get(name)}, not {wanted.get(name)}")
    return " and ".join(found)


def _give_up(writer: DatasetWriter | None, journal: dict[str, Any] | None) -> str:
    """Leave an unfinished data set for a later attempt, or nothing if it had hardly begun."""
    if writer is None:
        return ""
    writer.close()
    if journal is None and writer.cursor == Cursor():
        remove_data_set(writer.directory)
        return ""
    return (
        f"{writer.directory}: {writer.cursor.documents:,} documents are done and kept; "
        "the same command goes on from there, --overwrite begins anew"
    )


def _summary(out: Path, info: dict[str, Any], seconds: float) -> None:
    vocabulary = info["tokenizer"]
    print(f"{out}: {vocabulary['type']} tokenizer, vocabulary of {vocabulary['vocab_size']:,}")
    for split, entry in info["splits"].items():
        print(
            f"  {split:5}  {entry['tokens']:>15,} tokens  {entry['bytes']:>15,} bytes  "
            f"{entry['documents']:,} document(s)  {len(entry['shards'])} shard(s)"
        )
    if "val" not in info["splits"]:
        print("  no validation split: too few documents for it")
    print(f"  in {seconds:.1f} s; to look at it: python -m gpt_dist.prepare inspect {out}")


if __name__ == "__main__":
    run_main(main)
