"""What a checkpoint is on disk, and how one is found.

``checkpoints/step-00000100/`` holds ``model.safetensors``, ``optimizer.safetensors``,
``tokenizer.json`` and ``state.json``, which lists the sha256 of the other files. A directory with
such a name is complete: it gets the name by a rename after everything in it is on the disk, and
loses it by a rename before anything in it is removed. Nothing is ever unpickled.

Where a step is saved a second time, the older checkpoint is called ``step-00000100.replaced`` for
a moment. It stands for the step as long as there is no ``step-00000100``.
"""

from __future__ import annotations

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
STEP_DIRECTORY = re.compile(rf"step-(\d{{8}})({re.escape(REPLACED)})?")


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
    if not directory.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()):  # a step's own name sorts before the replaced one
        if STEP_DIRECTORY.fullmatch(path.name):
            found.setdefault(step_of(path), path)
    return [found[step] for step in sorted(found)]


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
        GptDistError: it is missing, not JSON, or of a later format.
    """
    path = directory / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = state["format_version"]
        state["config"], _ = migrate(state["config"])
        ModelConfig.model_validate(state["config"]["model"])
    except OSError as error:
        raise GptDistError(describe(error)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise GptDistError(f"{path}: damaged ({type(error).__name__}: {error})") from None
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
        GptDistError: a file is missing or changed; the message names it.
    """
    for name, expected in state["files"].items():
        if name == "optimizer.safetensors" and not optimizer:
            continue
        path = directory / name
        if not path.is_file():
            raise GptDistError(f"{path}: missing from the checkpoint")
        if file_sha256(path) != expected:
            raise GptDistError(f"{path}: does not match its checksum; the file is damaged")
