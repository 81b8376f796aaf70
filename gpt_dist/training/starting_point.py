"""Where a run continues: the newest checkpoint that is whole, or the one that was asked for.

Nothing here writes. A run calls this under its directory's lock, a dry run without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from gpt_dist.checkpoints.checkpoint import (
    DamagedError,
    candidates,
    read_state,
    resolve,
    step_name,
    step_of,
    verify,
)
from gpt_dist.checkpoints.directory import aside
from gpt_dist.config.command_line import explain
from gpt_dist.config.resuming import as_it_ran, changes, conflicts, way_out
from gpt_dist.config.settings import Config
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.optim.schedules import decay_start


class Start(NamedTuple):
    """The checkpoint that a run continues."""

    path: Path
    state: dict[str, Any]
    """Its ``state.json``."""
    damaged: tuple[Path, ...] = ()
    """Later checkpoints that are to be set aside."""
    notes: tuple[str, ...] = ()
    """What to tell the user: damage, and settings that changed."""


def find_start(
    directory: Path, config: Config, fingerprint: str | None, *, restarted: bool = False
) -> Start | None:
    """Where a run continues; None for a new run.

    Args:
        directory: of the run.
        config: the run's configuration.
        fingerprint: of its data sets; None where there is no data to compare.
        restarted: whether this launch has written here before, and so continues its own run
            whatever ``resume`` says.

    Raises:
        UsageError: ``resume`` or a setting contradicts what the directory holds.
        GptDistError: the checkpoint cannot be read, or none is whole.
    """
    found = candidates(directory / "checkpoints")
    if config.resume == "auto" or (found and restarted):
        return newest_whole(found, config, fingerprint)
    if config.resume == "never":
        if found:
            raise UsageError(
                f"resume = never: {directory} already holds a run ({found[0].name}); choose "
                "another out_dir, or resume = auto to continue it"
            )
        return None
    path = resolve(config.resume)
    try:
        start = open_start(path, config, fingerprint)
    except DamagedError as error:
        if path.parent.resolve() != (directory / "checkpoints").resolve():
            raise
        raise DamagedError(
            f"{error}; resume = auto continues from the newest checkpoint that is whole"
        ) from None
    damaged: dict[Path, DamagedError] = {}
    for checkpoint in found:
        if step_of(checkpoint) <= start.state["step"]:
            continue
        damage = damage_of(checkpoint)
        if damage is None:
            raise UsageError(
                f"resume = {config.resume}: {directory} holds later checkpoints "
                f"({checkpoint.name}); choose another out_dir to branch off"
            )
        damaged[checkpoint] = damage
    return falling_back(start, damaged)


def newest_whole(found: list[Path], config: Config, fingerprint: str | None) -> Start | None:
    """The first of some checkpoints that is not damaged; None where there are none.

    Raises:
        UsageError: a setting contradicts it.
        DamagedError: none is whole; the message is about the first.
    """
    damaged: dict[Path, DamagedError] = {}
    for path in found:
        try:
            return falling_back(open_start(path, config, fingerprint), damaged)
        except DamagedError as error:
            damaged[path] = error
    if damaged:
        newest = damaged[found[0]]
        raise DamagedError(
            f"{newest}; no earlier checkpoint is whole: choose another out_dir for a new run"
        )
    return None


def falling_back(start: Start, damaged: dict[Path, DamagedError]) -> Start:
    """A start with later checkpoints that are damaged, and a line about each."""
    lines = [
        f"damaged: {error}; continuing {start.path.name} instead, the damaged checkpoint is kept "
        f"as {aside(path).name}"
        for path, error in damaged.items()
    ]
    return start._replace(damaged=tuple(damaged), notes=(*lines, *start.notes))


def open_start(path: Path, config: Config, fingerprint: str | None) -> Start:
    """Check that a run can continue from a checkpoint; the cheap checks come first.

    Raises:
        UsageError: it holds weights alone, or a setting contradicts it.
        DamagedError: a file is missing or not as it was written.
        GptDistError: a file cannot be read.
    """
    state = read_state(path) if (path / "state.json").is_file() else {}
    if not state and not (path / "config.json").is_file():
        raise DamagedError(f"{path / 'state.json'}: missing from the checkpoint")
    if "sequences" not in state:  # imported, or exported
        raise UsageError(
            f"resume = {path}: these are weights without a run's state; start a new run "
            f"from them with --train.init_from {path}"
        )
    saved = check_same_run(config, state, fingerprint, path)
    verify(path, state)
    return Start(path, state, notes=(*changes(saved, config), *decayed(saved, config, path, state)))


def decayed(saved: Config, config: Config, path: Path, state: dict[str, Any]) -> list[str]:
    """A line where a run goes on whose learning rate was already falling (``wsd``)."""
    before, now = saved.train.steps, config.train.steps
    epochs = saved.train.epochs, config.train.epochs
    if saved.optim.schedule != "wsd" or epochs != (None, None) or before is None or now is None:
        return []
    first = decay_start(saved.optim, before)
    if now <= before or state["step"] <= first:
        return []
    earlier = path.with_name(step_name(first))
    advice = f"; better continue --resume {earlier} in another --out_dir" * earlier.is_dir()
    return [f"optim.schedule = wsd: the learning rate fell since step {first}{advice}"]


def damage_of(path: Path) -> DamagedError | None:
    """What is damaged in a checkpoint; None where it is whole."""
    try:
        verify(path, read_state(path))
    except DamagedError as error:
        return error
    return None


def check_same_run(
    config: Config, state: dict[str, Any], fingerprint: str | None, source: Path
) -> Config:
    """Check that a checkpoint belongs to this configuration; returns the checkpoint's own.

    Raises:
        UsageError: naming every setting that differs, with both values.
        GptDistError: the checkpoint's configuration cannot be read.
    """
    try:
        # Each setting alone: whether they fit together depends on the ranks, which may change.
        saved = Config.model_validate(as_it_ran(state["config"]))
    except ValidationError as error:
        raise GptDistError(f"{source}/state.json: {'; '.join(explain(error))}") from None
    problems = conflicts(saved, config, source)
    if not problems and fingerprint not in (None, state["fingerprint"]):
        problems.append(
            f"data.path = {', '.join(config.data.path)}: not the data of the run in {source} "
            f"(fingerprint {str(fingerprint)[:12]}, there {state['fingerprint'][:12]})"
        )
    if problems:
        problems[-1] += f"; {way_out(saved, config, source)}"
        raise UsageError("\n".join(problems))
    return saved
