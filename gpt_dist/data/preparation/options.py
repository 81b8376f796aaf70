"""The command line of ``gpt_dist.prepare``."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from gpt_dist.data.catalog import VARIANTS
from gpt_dist.errors import Parser, UsageError

EPILOG = """\
examples:
  python -m gpt_dist.prepare shakespeare --tokenizer char
  python -m gpt_dist.prepare tinystories --workers 8
  python -m gpt_dist.prepare fineweb-edu --variant sample-10BT
  python -m gpt_dist.prepare text books/ --split files --tokenizer bpe --vocab-size 8192
  python -m gpt_dist.prepare jsonl 'crawl/*.jsonl.gz' --field text --out data/crawl
  python -m gpt_dist.prepare hf allenai/c4 --subset en --out data/c4
  python -m gpt_dist.prepare inspect data/shakespeare-char

Each source has its own help: python -m gpt_dist.prepare fineweb-edu --help.
On a machine without internet, copy the files there and give --source DIR.
After a kill the same command resumes."""

TOKENIZERS = ("gpt2", "char", "bpe")
"""Tokenizers that need no file."""
MAX_SHARD_TOKENS = 2**31 - 1
"""The header stores the count as an int32."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check a command line.

    Raises:
        UsageError: what is wrong, in one line.
        SystemExit: after printing ``--help``.
    """
    args = make_parser().parse_args(argv)
    if args.command == "inspect":
        return args
    if args.tokenizer not in TOKENIZERS and not Path(args.tokenizer).exists():
        raise UsageError(
            f"--tokenizer {args.tokenizer}: no such tokenizer; valid are {', '.join(TOKENIZERS)}, "
            "or the path of a tokenizer.json"
        )
    if args.tokenizer != "bpe" and args.vocab_size is not None:
        raise UsageError("--vocab-size: only for --tokenizer bpe")
    if args.vocab_size is None:
        args.vocab_size = 8192
    from gpt_dist.text.tokenizers import MAX_VOCAB_SIZE  # imports numpy, which --help does without

    if not 258 <= args.vocab_size <= MAX_VOCAB_SIZE:
        raise UsageError(
            f"--vocab-size {args.vocab_size}: valid are 258 (the bytes and two special tokens) to "
            f"{MAX_VOCAB_SIZE}"
        )
    if not 0 <= args.val_fraction < 1:
        raise UsageError(
            f"--val-fraction {args.val_fraction}: valid are 0 (none) and more, below 1"
        )
    if not 1 <= args.shard_tokens <= MAX_SHARD_TOKENS:
        raise UsageError(f"--shard-tokens {args.shard_tokens}: valid are 1 to {MAX_SHARD_TOKENS}")
    if not 1 <= args.workers <= 1024:
        raise UsageError(f"--workers {args.workers}: valid are 1 to 1024")
    if not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed {args.seed}: valid are 0 to {2**31 - 1}")
    if args.command in VARIANTS and not re.fullmatch(
        r"sample-[0-9]+BT|CC-MAIN-[0-9]{4}-[0-9]{2}", args.variant
    ):
        raise UsageError(
            f"--variant {args.variant}: valid are sample-10BT, sample-100BT, sample-350BT and the "
            "names of dumps, such as CC-MAIN-2024-10"
        )
    # Hugging Face tokenizers takes its number of threads from the environment.
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.workers))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return args


def make_parser() -> argparse.ArgumentParser:
    """All sources as subcommands."""
    parser = Parser(
        prog="gpt_dist.prepare",
        description="Turn text into token shards that gpt_dist.train reads.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sources = parser.add_subparsers(dest="command", metavar="SOURCE", required=True)

    def add(name: str, help: str, val_fraction: float, where: str) -> argparse.ArgumentParser:
        source = sources.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False
        )
        source.set_defaults(variant=None)
        _common(source, val_fraction, where)
        return source

    add("shakespeare", "nine plays, 1 MB, shipped with the package", 0.1, "another text file")
    add(
        "tinyshakespeare",
        "Karpathy's 1.1 MB of Shakespeare, split as in nanoGPT",
        0.1,
        "the file input.txt, or a URL of it",
    )
    hub = "a directory laid out as on the hub, or the URL of a mirror of the hub"
    stories = add(
        "tinystories",
        "stories in the words of a four-year-old (2 GB), with their own validation split",
        0.01,
        f"a file, {hub}",
    )
    stories.add_argument(
        "--variant", choices=["v2", "v1"], help="v2 (written by GPT-4 only; default) or v1"
    )
    _revision(stories)
    for name, what in (("fineweb", "the web, filtered"), ("fineweb-edu", "its educational part")):
        web = add(
            name,
            f"FineWeb: {what}; sample-10BT is 10 billion tokens (about 28 GB to fetch)",
            0.005,
            hub,
        )
        web.add_argument(
            "--variant",
            default=VARIANTS[name],
            metavar="NAME",
            help="sample-10BT (default), sample-100BT, sample-350BT or a dump, CC-MAIN-2024-10",
        )
        _revision(web)
    files = "further files, by path, pattern or URL"
    text = add("text", "text files (UTF-8, may be compressed: .gz .bz2 .zst .lz4)", 0.01, files)
    _paths(text)
    text.add_argument(
        "--split",
        choices=["files", "lines", "eot"],
        default="files",
        help="a document is a file (default), a line, or the text between two <|endoftext|>; "
        "of a single file, or of each of a few, the last part is for validation",
    )
    jsonl = add("jsonl", "JSON lines: one object on each line", 0.01, files)
    _paths(jsonl)
    jsonl.add_argument(
        "--field", default="text", help="key of the text (default text); a.b looks inside objects"
    )
    parquet = add("parquet", "parquet files", 0.01, files)
    _paths(parquet)
    parquet.add_argument("--column", default="text", help="column of the text (default text)")
    hf = add(
        "hf",
        "any data set of the Hugging Face hub, as a stream",
        0.01,
        "a local copy of it, or the URL of a mirror of the hub",
    )
    hf.add_argument("name", metavar="NAME", help="such as allenai/c4, or a local directory")
    hf.add_argument("--subset", help="configuration of the data set")
    _revision(hf)
    hf.add_argument("--hf-split", default="train", help="its split to read (default train)")
    hf.add_argument("--field", default="text", help="field of the text (default text)")

    inspect = sources.add_parser(
        "inspect",
        help="verify a data set: checksums, counts, and a sample of its text",
        description="Verify the checksums of a data set and show its counts and a decoded sample.",
    )
    inspect.add_argument("directory", metavar="DIR")
    return parser


def _paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="file, directory, quoted pattern or URL"
    )


def _common(parser: argparse.ArgumentParser, val_fraction: float, where: str) -> None:
    parser.add_argument("--source", metavar="PATH_OR_URL", help=f"where the data is: {where}")
    parser.add_argument(
        "--out", metavar="DIR", help="data set to write (default data/SOURCE[-VARIANT][-TOKENIZER])"
    )
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="gpt2|char|bpe|PATH",
        help="gpt2 (default); char: one token for each character; bpe: trained on this text; "
        "or the path of a tokenizer.json",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens of bpe (default 8192)")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=val_fraction,
        metavar="F",
        help=f"share for validation (default {val_fraction}); 0 = none",
    )
    parser.add_argument(
        "--shard-tokens",
        type=_count,
        default=100_000_000,
        metavar="N",
        help="tokens in each shard (default 100M)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=_cores(),
        metavar="N",
        help="threads that tokenise (default: all cores); the result is always the same",
    )
    parser.add_argument(
        "--seed", type=int, default=1337, help="chooses the validation documents (default 1337)"
    )
    parser.add_argument(
        "--downloads",
        default="data/downloads",
        metavar="DIR",
        help="directory for downloaded files (default data/downloads)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the data set that is in --out"
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # the cores this process may use; not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of the hub's data set (default: its main branch as it is now; "
        "the commit is recorded)",
    )


def _count(text: str) -> int:
    """A whole number; 100M is one hundred million."""
    match = re.fullmatch(r"([0-9_]+)([kKmMgGbB]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 100M")
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}[match[2].lower()]
    return int(match[1]) * scale
