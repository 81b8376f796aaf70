"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_dist.errors import UsageError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it into place.

    Raises:
        OSError: with the file's name, also where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error say which file it is about; a failed write to a full disk does not by itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def needing_directory(path: Path) -> Iterator[None]:
    """Make a directory and those above it; afterwards remove those of them that stayed empty.

    Raises:
        OSError: it cannot be made.
    """
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for directory in made:
            if not directory.exists() or any(directory.iterdir()):
                break
            directory.rmdir()


def file_sha256(path: Path) -> str:
    """Checksum of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Flush a directory, so that renames and removals in it survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name; it gets its own when the block ends well.

    Raises:
        UsageError: ``path`` exists and is not an empty directory.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path}: exists already; choose a new directory or an empty one")
    temporary = path.with_name(f".{path.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier, killed attempt
    with needing_directory(path.parent):
        try:
            temporary.mkdir()
            yield temporary
            sync_directory(temporary)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(path.parent)
