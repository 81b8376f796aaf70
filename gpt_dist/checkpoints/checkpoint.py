"""What a checkpoint is on disk, and how one is found.

``checkpoints/step-00000100/`` holds ``model.safetensors``, ``optimizer.safetensors``,
``tokenizer.json`` and ``state.json``, which lists the sha256 of the other files. A directory with
such a name is complete: it gets the name by a rename after everything in it is on the disk, and
loses it by a rename before anything in it is removed. Nothing is ever unpickled.

Where a step is saved a second time, the older checkpoint is called ``step-00000100.replaced`` for
a moment. It stands for the step as long as there is no ``step-00000100``. A checkpoint whose files
are damaged is renamed to ``step-00000100.damaged`` when the run continues from an earlier one.
Nothing reads or removes it.
"""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

from gpt_dist.config.migrations import migrate
from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError, describe
from gpt_dist.files import file_sha256

FORMAT_VERSION = 1
REPLACED = ".replaced"
"""Ends the name of a checkpoint while another of the same step takes its place."""
DAMAGED = ".damaged"
"""Ends the name of a checkpoint that was set aside."""
STEP_DIRECTORY = re.compile(rf"step-(\d{{8}})({re.escape(REPLACED)})?")


class DamagedError(GptDistError):
    """A file of a checkpoint is missing or not as it was written."""


def step_name(step: int) -> str:
    """``step-00000100`` for step 100."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's directory.

    Raises:
        ValueError: it has no such name.
    """
    match = STEP_DIRECTORY.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint}: not named like a checkpoint")
    return int(match[1])


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoint of each step, oldest first."""
    # Oldest first. A replaced checkpoint comes before the one that took its name, which wins.
    return list({step_of(path): path for path in reversed(candidates(directory))}.values())


def candidates(directory: Path) -> list[Path]:
    """All complete checkpoints, newest first: of a step that was replaced, both."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if STEP_DIRECTORY.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (-step_of(path), path.name))


def newest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = complete_checkpoints(directory)
    return found[-1] if found else None


def resolve(path: str | Path) -> Path:
    """The directory to load for any value of ``--checkpoint``.

    A run's directory stands for its newest checkpoint. A checkpoint's directory (``best`` too) and
    an exported Hugging Face directory stand for themselves.

    Raises:
        UsageError: there is nothing to load.
    """
    path = Path(path)
    target = path.resolve()
    if not target.exists() and STEP_DIRECTORY.fullmatch(target.name):
        target = target.with_name(target.name + REPLACED)
    if not target.is_dir():
        raise UsageError(f"{path}: no such run, checkpoint or model directory")
    if (target / "state.json").is_file() or (target / "config.json").is_file():
        return target
    for directory in (path / "checkpoints", path):
        newest = newest_checkpoint(directory)
        if newest:
            return newest
    raise UsageError(
        f"{path}: holds no complete checkpoint; expected a run directory (checkpoints/step-…), "
        "a checkpoint (state.json) or an exported model (config.json)"
    )


def read_state(directory: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        DamagedError: it is missing, not JSON, or incomplete.
        GptDistError: it cannot be read, or is of a later format.
    """
    path = directory / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = state["format_version"]
        state["config"], _ = migrate(state["config"])
        ModelConfig.model_validate(state["config"]["model"])
        state["files"] = dict(state["files"])
    except OSError as error:
        raise unreadable(error) from None
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path}: damaged ({type(error).__name__}: {reason})") from None
    if version != FORMAT_VERSION:
        raise GptDistError(f"{path}: format_version {version}; this version reads {FORMAT_VERSION}")
    return state


def verify(directory: Path, state: dict[str, Any], *, optimizer: bool = True) -> None:
    """Compare a checkpoint's files with their checksums.

    Args:
        directory: the checkpoint.
        state: its ``state.json``.
        optimizer: whether to read ``optimizer.safetensors`` too, the largest file.

    Raises:
        DamagedError: a file is missing or changed; the message names it.
        GptDistError: a file cannot be read.
    """
    for name, expected in state["files"].items():
        if name == "optimizer.safetensors" and not optimizer:
            continue
        path = directory / name
        if not path.is_file():
            raise DamagedError(f"{path}: missing from the checkpoint")
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise unreadable(error) from None
        if digest != expected:
            raise DamagedError(f"{path}: does not match its checksum; the file is damaged")


def unreadable(error: OSError) -> GptDistError:
    """The error for a checkpoint's file that cannot be read.

    A missing file and a bad sector are damage. Missing rights and a network file system that does
    not answer are not: the checkpoint may be whole.
    """
    damage = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
    return (DamagedError if damage else GptDistError)(describe(error))
