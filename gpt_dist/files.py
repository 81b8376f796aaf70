"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it into place.

    Raises:
        OSError: with the file's name, also where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        name_file(error, path)
        raise
    sync_directory(path.parent)


def name_file(error: BaseException, path: Path) -> None:
    """Let an error say which file it is about; a failed write to a full disk does not by itself."""
    if isinstance(error, OSError) and not error.filename:
        error.filename = str(path)


def sync_directory(directory: Path) -> None:
    """Flush a directory, so that renames and removals in it survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
