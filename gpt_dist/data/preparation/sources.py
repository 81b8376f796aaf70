"""Where text comes from: each source of ``gpt_dist.prepare`` as a list of inputs to read.

A named source (TinyStories, FineWeb) is the same text whether it is read from local files, from the
hub or from a mirror, so these make equal data sets.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from gpt_dist.data.dataset import SPLITS, Split
from gpt_dist.data.preparation.documents import COMPRESSED
from gpt_dist.data.preparation.downloads import RemoteFile, Report
from gpt_dist.data.preparation.hub import hub_files, resolve_commit, token_for
from gpt_dist.data.preparation.inputs import (
    FileInput,
    HubInput,
    jsonl_reader,
    parquet_reader,
    text_reader,
)
from gpt_dist.data.preparation.readers import TextMode
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.text.bundled import SHAKESPEARE

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
class Source:
    """What to tokenise.

    Attributes:
        inputs: in the order in which they are read.
        whole_files: each file is one document of text.
        commit: of the hub's data set; None for other sources.
        content: identifies the files, here or on the hub, by their names and sizes.
        urls: identifies the files of other servers.
    """

    inputs: Sequence[FileInput | HubInput]
    whole_files: bool = False
    commit: str | None = None
    content: str | None = None
    urls: list[str] = field(default_factory=list)


def open_source(args: argparse.Namespace, report: Report, commit: str | None = None) -> Source:
    """The inputs that a ``prepare`` command names.

    Args:
        args: the parsed command line (options.py).
        report: is called with lines on the progress of a download.
        commit: of the hub's data set, where an earlier attempt recorded it.

    Raises:
        UsageError: a file does not exist, or nothing in a directory can be read.
        GptDistError: the hub has no such data, or there is no connection.
    """
    if getattr(args, "revision", None) and not is_on_hub(args):
        raise UsageError("--revision: only for data of the hub, not for files")
    source = _OPENERS[args.command](args, commit)
    files = [entry for entry in source.inputs if isinstance(entry, FileInput)]
    for entry in files:
        entry.downloads, entry.report = Path(args.downloads), report
    sizes: list[tuple[str, int]] = []
    for file in (entry.file for entry in files):
        if isinstance(file, Path):
            sizes.append((file.name, file.stat().st_size))
        elif source.commit and file.size is not None:
            sizes.append((Path(file.name).name, file.size))
        elif file.sha256 is None:
            source.urls.append(_public(file.url))
    if sizes:
        names = "\n".join(f"{name} {size}" for name, size in sizes)
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        total = sum(size for _, size in sizes)
        source.content = f"{len(sizes)} file(s), {total:,} bytes ({digest})"
    return source


def is_on_hub(args: argparse.Namespace) -> bool:
    """Whether only the hub, or a mirror of it, can say what the inputs are."""
    if args.command == "hf":
        return not Path(_hf_name(args)).exists()
    if args.command == "tinystories" or args.command in FINEWEB:
        return not args.source or _is_endpoint(args.source)
    return False


def _shakespeare(args: argparse.Namespace, _: str | None) -> Source:
    path = _local(args.source)[0] if args.source else SHAKESPEARE
    return Source([FileInput(path, text_reader("files"))], whole_files=True)


def _tinyshakespeare(args: argparse.Namespace, _: str | None) -> Source:
    file = _one_file(args.source) if args.source else TINYSHAKESPEARE
    return Source([FileInput(file, text_reader("files"))], whole_files=True)


def _tinystories(args: argparse.Namespace, commit: str | None) -> Source:
    if args.source and not _is_endpoint(args.source):
        if _is_url(args.source) or Path(args.source).is_file():
            return Source([_any_file(_one_file(args.source), None)])
        return Source(_local_tinystories(args))
    commit = commit or resolve_commit(TINYSTORIES, args.revision, args.source)
    listed = {
        file.name.rpartition("/")[2]: file
        for file in hub_files(TINYSTORIES, "", commit, args.source, ".txt")
    }
    train_name, val_name = TINYSTORIES_FILES[args.variant or "v2"]
    missing = [name for name in (train_name, val_name) if name not in listed]
    if missing:
        raise GptDistError(f"{TINYSTORIES}: no file {missing[0]} there")
    inputs = [_any_file(listed[train_name], "train"), _any_file(listed[val_name], "val")]
    return Source(inputs, commit=commit)


def _local_tinystories(args: argparse.Namespace) -> list[FileInput | HubInput]:
    """The files of one variant in a directory, which may be a full copy of the hub's."""
    files = _local(args.source)
    named = {path.name: path for path in reversed(files)}
    present = [variant for variant, (train, _) in TINYSTORIES_FILES.items() if train in named]
    if present:
        wanted = args.variant or "v2"
        if wanted not in present:
            raise UsageError(
                f"--source {args.source}: no {TINYSTORIES_FILES[wanted][0]} there; "
                f"for {TINYSTORIES_FILES[present[0]][0]} give --variant {present[0]}"
            )
        parts = zip(TINYSTORIES_FILES[wanted], SPLITS, strict=True)
        return [_any_file(named[name], split) for name, split in parts if name in named]
    if args.variant:
        raise UsageError(
            f"--variant {args.variant}: --source {args.source} has no "
            f"{TINYSTORIES_FILES[args.variant][0]}; leave out --variant to read other files"
        )
    train = [path for path in files if "train" in path.name.lower()]
    val = [path for path in files if "val" in path.name.lower()]
    if not train:
        raise UsageError(f"--source {args.source}: no file there has 'train' in its name")
    suffix = train[0].suffix  # where text and parquet are both there, one of them
    pairs = [*((path, "train") for path in train), *((path, "val") for path in val)]
    return [_any_file(path, cast(Split, split)) for path, split in pairs if path.suffix == suffix]


def _fineweb(args: argparse.Namespace, commit: str | None) -> Source:
    variant = args.variant
    sample = variant.startswith("sample-")
    folder = f"sample/{variant.removeprefix('sample-')}" if sample else f"data/{variant}"
    read = parquet_reader("text")
    if args.source and not _is_endpoint(args.source):
        if _is_url(args.source):
            return Source([FileInput(_one_file(args.source), read)])
        root = Path(args.source)
        inside = root / folder
        paths = _local(str(inside if inside.is_dir() else root), (".parquet",))
        return Source([FileInput(path, read) for path in paths])
    repository = FINEWEB[args.command]
    commit = commit or resolve_commit(repository, args.revision, args.source)
    files = hub_files(repository, folder, commit, args.source)
    return Source([FileInput(file, read) for file in files], commit=commit)


def _text(args: argparse.Namespace, _: str | None) -> Source:
    files = _named_files(args, TEXT_SUFFIXES)
    mode: TextMode = args.split
    inputs = [FileInput(file, text_reader(mode)) for file in files]
    return Source(inputs, whole_files=mode == "files")


def _jsonl(args: argparse.Namespace, _: str | None) -> Source:
    read = jsonl_reader(args.field)
    return Source([FileInput(file, read) for file in _named_files(args, JSON_SUFFIXES)])


def _parquet(args: argparse.Namespace, _: str | None) -> Source:
    read = parquet_reader(args.column)
    return Source([FileInput(file, read) for file in _named_files(args, (".parquet",))])


def _hf_name(args: argparse.Namespace) -> str:
    """Name on the hub, or a local copy."""
    return str(args.source if args.source and not _is_url(args.source) else args.name)


def _hf(args: argparse.Namespace, commit: str | None) -> Source:
    name, endpoint = _hf_name(args), args.source if _is_url(args.source or "") else None
    token = token_for(endpoint)
    if endpoint:
        os.environ["HF_ENDPOINT"] = endpoint  # read when the library is imported
    if is_on_hub(args):
        commit = commit or resolve_commit(name, args.revision, endpoint)
    from datasets import load_dataset  # type: ignore[attr-defined]

    try:
        rows = load_dataset(
            name, args.subset, split=args.hf_split, streaming=True, revision=commit, token=token
        )
    except Exception as error:  # the library raises errors of many kinds
        reason = " ".join(str(error).split())
        raise GptDistError(f"{name}: cannot be opened by datasets: {reason[:300]}") from None
    splits = rows.info.splits or {}
    known = splits.get(args.hf_split)
    total = known.num_examples if known is not None else None
    return Source([HubInput(name, rows, args.field, total or None)], commit=commit)


_OPENERS: dict[str, Callable[[argparse.Namespace, str | None], Source]] = {
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


# --- files ---------------------------------------------------------------------------------------


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _is_endpoint(text: str) -> bool:
    """The address of a mirror of the hub, rather than of one file."""
    suffix = Path(urlsplit(text).path).suffix.lower()
    known = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *COMPRESSED, ".parquet")
    return _is_url(text) and suffix not in known


def _one_file(text: str) -> Path | RemoteFile:
    """A file by path or URL; URLs that differ only in their query are kept apart."""
    if not _is_url(text):
        return _local(text)[0]
    parts = urlsplit(text)
    folder = parts.netloc.rpartition("@")[2].replace(":", "-")
    if parts.query:
        folder += f"/{_query_digest(parts.query)}"
    return RemoteFile(text, f"{folder}/{parts.path.lstrip('/')}")


def _query_digest(query: str) -> str:
    return hashlib.sha256(query.encode()).hexdigest()[:16]


def _public(url: str) -> str:
    """A URL as a data set may show it: a query or user name may hold a secret."""
    parts = urlsplit(url)
    query = f"?{_query_digest(parts.query)}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def _any_file(file: Path | RemoteFile, split: Split | None) -> FileInput:
    """A file of documents in the format of its suffix; plain text has ``<|endoftext|>`` between."""
    name = Path(file.name)
    suffix = Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix
    if suffix == ".parquet":
        return FileInput(file, parquet_reader("text"), split)
    if suffix in JSON_SUFFIXES:
        return FileInput(file, jsonl_reader("text"), split)
    return FileInput(file, text_reader("eot"), split)


def _named_files(args: argparse.Namespace, suffixes: tuple[str, ...]) -> list[Path | RemoteFile]:
    """The files that a command names by path, directory, pattern or URL."""
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
        UsageError: there are none.
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
    """The suffix that tells the format, without that of a compression."""
    plain = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return plain.suffix.lower()
