"""Where text comes from: each source of ``gpt_dist.prepare`` as a list of inputs to read.

A source is found in local files, or downloaded; in both cases what it is does not depend on where
it came from, so a data set made from a mirror equals one made from the original.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from gpt_dist.data.preparation.documents import COMPRESSED, Piece, Position
from gpt_dist.data.preparation.downloads import RemoteFile, Report, hub_files
from gpt_dist.data.preparation.readers import (
    TextMode,
    read_hub,
    read_jsonl,
    read_parquet,
    read_text,
)
from gpt_dist.data.shards import Split
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.text.cuts import Cut

if TYPE_CHECKING:
    pass

Reader = Callable[[Path, Position, Cut], Iterator[Piece]]

TINYSHAKESPEARE = RemoteFile(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinyshakespeare.txt",
    1115394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
TINYSTORIES = "roneneldan/TinyStories"
TINYSTORIES_FILES = {
    "v2": ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"),
    "v1": ("TinyStories-train.txt", "TinyStories-valid.txt"),
}
FINEWEB = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass
class FileInput:
    """A file, here or still to be downloaded.

    Attributes:
        file: a path, or what to download.
        reader: gives the documents of the file.
        split: where its documents go; None: chosen document by document.
        downloads: where downloads are kept.
        report: is told how far a download is.
    """

    file: Path | RemoteFile
    reader: Reader
    split: Split | None = None
    downloads: Path = Path()
    report: Report = lambda text: None
    _fetching: Future[Path] | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        return self.file.name if isinstance(self.file, RemoteFile) else str(self.file)

    @property
    def size(self) -> int:
        if isinstance(self.file, RemoteFile):
            return self.file.size or 1
        return self.file.stat().st_size

    def path(self) -> Path:
        """The file on disk, downloaded if need be.

        Raises:
            GptDistError: it cannot be had.
        """
        if isinstance(self.file, Path):
            return self.file
        self.prefetch()
        assert self._fetching is not None
        return self._fetching.result()

    def prefetch(self) -> None:
        if isinstance(self.file, RemoteFile) and self._fetching is None:
            pool = ThreadPoolExecutor(1)
            self._fetching = pool.submit(self.file.fetch, self.downloads, self.report)
            pool.shutdown(wait=False)

    def read(self, at: Position, cut: Cut) -> Iterator[Piece]:
        return self.reader(self.path(), at, cut)


@dataclass(frozen=True)
class HubInput:
    """A data set of the hub, by name, through ``datasets``."""

    name: str
    rows: Any
    field: str
    total: int | None
    split: Split | None = None
    size: int = 1

    def read(self, at: Position, cut: Cut) -> Iterator[Piece]:
        return read_hub(self.rows, self.name, self.field, self.total, at, cut)

    def prefetch(self) -> None:
        pass


@dataclass
class Source:
    """What to tokenise.

    Attributes:
        inputs: in the order in which they are read.
        content: what identifies the inputs, where known; a data set made from others differs.
        one_document: all is one document, to be split by characters.
    """

    inputs: Sequence[FileInput | HubInput]
    content: str | None = None
    one_document: bool = False


def open_source(args: argparse.Namespace, report: Report) -> Source:
    """The inputs that a ``prepare`` command names.

    Args:
        args: of the command line (see prepare.py).
        report: is told how far a download is.

    Raises:
        UsageError: no such file, or nothing in it that could be read.
        GptDistError: no connection.
    """
    opener = _OPENERS[args.command]
    source = opener(args)
    inputs: list[FileInput | HubInput] = []
    for entry in source.inputs:
        if isinstance(entry, FileInput):
            entry.downloads, entry.report = Path(args.downloads), report
        inputs.append(entry)
    local = [entry.file for entry in inputs if isinstance(entry, FileInput)]
    if source.content is None and all(isinstance(file, Path) for file in local) and local:
        paths = cast(list[Path], local)
        names = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
        size = sum(path.stat().st_size for path in paths)
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        content = f"{len(paths)} file(s), {size:,} bytes ({digest})"
        return replace(source, inputs=inputs, content=content)
    return replace(source, inputs=inputs)


def is_remote(args: argparse.Namespace) -> bool:
    """Whether a ``prepare`` command would have to go to the network to know its inputs."""
    if args.source:
        return _is_url(args.source)
    if args.command in ("text", "jsonl", "parquet"):
        return any(map(_is_url, args.paths))
    if args.command == "hf":
        return not Path(args.name).exists()
    return bool(args.command != "shakespeare")


def _shakespeare(args: argparse.Namespace) -> Source:
    bundled = Path(str(resources.files("gpt_dist.text") / "assets" / "shakespeare.txt.gz"))
    path = _local(args.source)[0] if args.source else bundled
    return Source([FileInput(path, text_reader("files"))], one_document=True)


def _tinyshakespeare(args: argparse.Namespace) -> Source:
    file = _one_file(args.source) if args.source else TINYSHAKESPEARE
    return Source([FileInput(file, text_reader("files"))], one_document=True)


def _tinystories(args: argparse.Namespace) -> Source:
    if args.source and not _is_endpoint(args.source):
        if _is_url(args.source) or Path(args.source).is_file():
            return Source([_any_file(_one_file(args.source), None)])
        files = _local(args.source)
        train = [path for path in files if "train" in path.name.lower()]
        val = [path for path in files if "val" in path.name.lower()]
        if not train:
            raise UsageError(f"--source {args.source}: no file there has 'train' in its name")
        suffix = train[0].suffix  # text and parquet side by side: one of them
        return Source(
            [_any_file(path, "train") for path in train if path.suffix == suffix]
            + [_any_file(path, "val") for path in val if path.suffix == suffix]
        )
    listed = {
        file.name.rpartition("/")[2]: file
        for file in hub_files(TINYSTORIES, "", args.source, ".txt")
    }
    train_name, val_name = TINYSTORIES_FILES[args.variant or "v2"]
    missing = [name for name in (train_name, val_name) if name not in listed]
    if missing:
        raise GptDistError(f"{TINYSTORIES}: no file {missing[0]} there")
    return Source([_any_file(listed[train_name], "train"), _any_file(listed[val_name], "val")])


def _fineweb(args: argparse.Namespace) -> Source:
    variant = args.variant
    sample = variant.startswith("sample-")
    folder = f"sample/{variant.removeprefix('sample-')}" if sample else f"data/{variant}"
    read = _parquet_reader("text")
    if args.source and not _is_endpoint(args.source):
        if _is_url(args.source):
            return Source([FileInput(_one_file(args.source), read)])
        root = Path(args.source)
        inside = root / folder
        paths = _local(str(inside if inside.is_dir() else root), (".parquet",))
        return Source([FileInput(path, read) for path in paths])
    files = hub_files(FINEWEB[args.command], folder, args.source)
    return Source([FileInput(file, read) for file in files])


def _text(args: argparse.Namespace) -> Source:
    files = _named_files(args, TEXT_SUFFIXES)
    mode: TextMode = args.split

    inputs = [FileInput(file, text_reader(mode)) for file in files]
    return Source(inputs, one_document=mode == "files" and len(files) == 1)


def _jsonl(args: argparse.Namespace) -> Source:
    read = _jsonl_reader(args.field)
    return Source([FileInput(file, read) for file in _named_files(args, JSON_SUFFIXES)])


def _parquet(args: argparse.Namespace) -> Source:
    read = _parquet_reader(args.column)
    return Source([FileInput(file, read) for file in _named_files(args, (".parquet",))])


def _hf(args: argparse.Namespace) -> Source:
    if args.source and _is_url(args.source):
        os.environ["HF_ENDPOINT"] = args.source
    from datasets import load_dataset  # type: ignore[attr-defined]

    name = args.source if args.source and not _is_url(args.source) else args.name
    try:
        rows = load_dataset(name, args.subset, split=args.hf_split, streaming=True)
    except Exception as error:  # the library raises errors of many kinds
        reason = " ".join(str(error).split())
        raise GptDistError(f"{name}: cannot be opened by datasets: {reason[:300]}") from None
    splits = rows.info.splits or {}
    known = splits.get(args.hf_split)
    total = known.num_examples if known is not None else None
    return Source([HubInput(name, rows, args.field, total or None)])


_OPENERS: dict[str, Callable[[argparse.Namespace], Source]] = {
    "shakespeare": _shakespeare,
    "tinyshakespeare": _tinyshakespeare,
    "tinystories": _tinystories,
    "fineweb": _fineweb,
    "fineweb-edu": _fineweb,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hf": _hf,
}


def text_reader(mode: TextMode, start: int = 0, end: int | None = None) -> Reader:
    return lambda path, at, cut: read_text(path, mode, at, start, end, cut)


def _jsonl_reader(field: str) -> Reader:
    return lambda path, at, cut: read_jsonl(path, field, at, cut)


def _parquet_reader(column: str) -> Reader:
    return lambda path, at, cut: read_parquet(path, column, at, cut)


# --- files ---------------------------------------------------------------------------------------


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _is_endpoint(text: str) -> bool:
    """The address of a mirror of the hub, rather than of one file."""
    suffix = Path(urlsplit(text).path).suffix.lower()
    known = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *COMPRESSED, ".parquet")
    return _is_url(text) and suffix not in known


def _one_file(text: str) -> Path | RemoteFile:
    """A file by path or URL."""
    if _is_url(text):
        host = urlsplit(text).netloc.replace(":", "-")
        return RemoteFile(text, f"{host}/{urlsplit(text).path.lstrip('/')}")
    return _local(text)[0]


def _any_file(file: Path | RemoteFile, split: Split | None) -> FileInput:
    """A file of documents, read as its name's ending tells (``<|endoftext|>`` in plain text)."""
    name = Path(file.name)
    suffix = Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix
    if suffix == ".parquet":
        return FileInput(file, _parquet_reader("text"), split)
    if suffix in JSON_SUFFIXES:
        return FileInput(file, _jsonl_reader("text"), split)
    return FileInput(file, text_reader("eot"), split)


def _named_files(args: argparse.Namespace, suffixes: tuple[str, ...]) -> list[Path | RemoteFile]:
    """The files that a command names: paths, directories, patterns, URLs."""
    names = [*args.paths, *([args.source] if args.source else [])]
    if not names:
        raise UsageError(f"{args.command}: name at least one file, directory or pattern")
    files: list[Path | RemoteFile] = []
    for name in names:
        files += [_one_file(name)] if _is_url(name) else _local(name, suffixes)
    return files


def _local(name: str, suffixes: tuple[str, ...] | None = None) -> list[Path]:
    """The files of a path, directory or pattern, sorted.

    Raises:
        UsageError: nothing there.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and (suffixes is None or _ending(file) in suffixes)
        ]
        wanted = f" with names in {', '.join(suffixes)}" if suffixes else ""
        if not found:
            raise UsageError(f"{name}: no files{wanted} in this directory")
        return found
    if glob.has_magic(name):
        matches = glob.glob(name, recursive=True)  # noqa: PTH207 (may be absolute)
        found = [file for file in sorted(map(Path, matches)) if file.is_file()]
        if not found:
            raise UsageError(f"{name}: no file matches this pattern")
        return found
    raise UsageError(f"{name}: no such file or directory")


def _ending(path: Path) -> str:
    """What kind of file it is, under its packing."""
    plain = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return plain.suffix.lower()
