"""The work of ``gpt_dist.prepare``: read, tokenise, write, and resume after a kill."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt_dist.data.catalog import default_directory
from gpt_dist.data.preparation.existing import (
    essential_arguments,
    found_complete,
    found_unfinished,
    own_directory,
)
from gpt_dist.data.preparation.progress import WorkProgress
from gpt_dist.data.preparation.shard_writing import DatasetWriter, remove_data_set
from gpt_dist.data.preparation.sources import Source, is_on_hub, open_source
from gpt_dist.data.preparation.tokenize_pool import (
    Chunk,
    Cursor,
    Input,
    read_chunks,
    split_chooser,
    tokenize,
)
from gpt_dist.data.preparation.validation import choose_rule, divide, outcome
from gpt_dist.errors import GptDistError, UsageError, describe
from gpt_dist.text.gpt2_vocabulary import END_OF_TEXT
from gpt_dist.text.tokenizers import BpeTokenizer, CharTokenizer, Tokenizer, load_tokenizer

COMMIT_SECONDS = 5.0
"""Between two entries in the journal: a kill costs about that much work."""
BPE_TRAINING_CHARACTERS = 1 << 28
"""A BPE is trained on this much text, from the beginning of the source."""


def prepare(args: argparse.Namespace) -> None:
    """Make a data set, resume an unfinished one, or find that it is there already.

    Args:
        args: the parsed command line (options.py).

    Raises:
        UsageError: the directory holds something else; a source is not there.
        GptDistError: the text or a download is not what it should be.
        OSError: a file cannot be written.
    """
    given = None if args.tokenizer in ("char", "bpe") else load_tokenizer(args.tokenizer)
    kind = given.name if given else args.tokenizer
    out = Path(args.out or default_directory(args.command, args.variant, kind))
    with WorkProgress("preparing") as progress:
        # The hub is asked only if there is work to do: a finished data set is found offline.
        source = None if is_on_hub(args) else open_source(args, progress.say)
        arguments = essential_arguments(args, given, source)
        if not args.overwrite and found_complete(out, arguments):
            return
        with own_directory(out):
            if args.overwrite:
                remove_data_set(out)
            journal = found_unfinished(out, arguments)
            if journal is None and any(not path.name.startswith(".") for path in out.iterdir()):
                raise UsageError(f"{out}: not empty and no data set; choose another --out")
            if source is None:
                commit = journal["arguments"].get("commit") if journal else None
                source = open_source(args, progress.say, commit)
                arguments = essential_arguments(args, given, source)
                found_unfinished(out, arguments)  # again, now that the files are known
            if journal is not None:
                arguments = journal["arguments"]
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
    rule = choose_rule(source, args.val_fraction, journal)
    inputs = divide(source, rule, args.val_fraction)
    begin = time.monotonic()
    writer = None
    try:
        if journal is not None:
            tokenizer = load_tokenizer(out)
        else:
            tokenizer = given or _make_tokenizer(args, source, inputs, progress)
        writer = DatasetWriter(out, arguments, tokenizer, args.shard_tokens, rule, journal)
        if journal is not None:
            print(f"{out}: resuming after {writer.cursor.documents:,} documents", file=sys.stderr)
        _tokenize_into(writer, inputs, args, progress)
        info = writer.finish()
    except BaseException as error:
        kept = _give_up(writer, journal)
        if kept and isinstance(error, (GptDistError, OSError)):
            wrapped = GptDistError(f"{describe(error)}; {kept}")
            wrapped.exit_status = getattr(error, "exit_status", 1)
            raise wrapped from None
        if kept and isinstance(error, KeyboardInterrupt):
            print(kept, file=sys.stderr)
        raise
    _summary(out, info, time.monotonic() - begin)


def _tokenize_into(
    writer: DatasetWriter, inputs: Sequence[Input], args: argparse.Namespace, progress: WorkProgress
) -> None:
    """Read, tokenise and write, with an entry in the journal every ``COMMIT_SECONDS``."""
    last_commit = time.monotonic()
    splits = writer.splits.values()
    tokenizer, choose = writer.tokenizer, split_chooser(args.val_fraction, args.seed)
    chunks = read_chunks(inputs, writer.cursor, choose, tokenizer.safe_cut)
    if args.command == "text" and args.split != "eot":
        chunks = watch_for_separators(chunks, args.split)
    for chunk, parts in tokenize(chunks, tokenizer, args.workers):
        writer.write(parts)
        if chunk.after is not None and time.monotonic() - last_commit >= COMMIT_SECONDS:
            writer.commit(chunk.after)
            last_commit = time.monotonic()
        documents = sum(split.documents for split in splits)
        progress.update(chunk.done, documents, sum(split.tokens for split in splits))
    if not sum(split.tokens for split in splits):
        names = ", ".join(dict.fromkeys(source.name for source in inputs))
        raise GptDistError(f"{names[:200]}: no text in it")


def watch_for_separators(chunks: Iterator[Chunk], mode: str) -> Iterator[Chunk]:
    """Pass chunks on; say once that a text holds ``<|endoftext|>``, which is plain text there."""
    said = False
    for chunk in chunks:
        if not said and any(END_OF_TEXT in text for run in chunk.runs for text in run.texts):
            said = True
            print(
                f"note: the text contains {END_OF_TEXT}; --split {mode} reads it as plain text, "
                "--split eot as the end of a document",
                file=sys.stderr,
            )
        yield chunk


def _make_tokenizer(
    args: argparse.Namespace, source: Source, inputs: Sequence[Input], progress: WorkProgress
) -> Tokenizer:
    """A tokenizer made from the text, in a first pass over it."""
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
        one_document = source.whole_files and len(source.inputs) == 1
        return CharTokenizer(characters, eot=documents > 1 and not one_document)
    return BpeTokenizer.train(_first(texts(), BPE_TRAINING_CHARACTERS), args.vocab_size)


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def _give_up(writer: DatasetWriter | None, journal: dict[str, Any] | None) -> str:
    """Keep an unfinished data set for a later attempt; remove one that holds nothing yet."""
    if writer is None:
        return ""
    writer.close()
    if journal is None and writer.cursor == Cursor():
        remove_data_set(writer.directory)
        return ""
    return (
        f"{writer.directory}: {writer.cursor.documents:,} documents are done and kept; "
        "run the same command to resume, or add --overwrite to start over"
    )


def _summary(out: Path, info: dict[str, Any], seconds: float) -> None:
    vocabulary = info["tokenizer"]
    print(f"{out}: {vocabulary['type']} tokenizer, vocabulary of {vocabulary['vocab_size']:,}")
    for split, entry in info["splits"].items():
        print(
            f"  {split:5}  {entry['tokens']:>15,} tokens  {entry['bytes']:>15,} bytes  "
            f"{entry['documents']:,} document(s)  {len(entry['shards'])} shard(s)"
        )
    line, far = outcome(info)
    print(f"  {line}")
    if far:
        print(f"note: {out}: {line}; documents are few or unequally long", file=sys.stderr)
    print(f"  in {seconds:.1f} s; to look at it: python -m gpt_dist.prepare inspect {out}")
