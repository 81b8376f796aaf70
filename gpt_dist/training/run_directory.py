"""``out_dir``: one writer at a time, one configuration for good, and where a run continues."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO

from pydantic import ValidationError

from gpt_dist.checkpoints.checkpoint import (
    complete_checkpoints,
    newest_checkpoint,
    read_state,
    resolve,
    step_of,
    verify,
)
from gpt_dist.config.command_line import explain, flags
from gpt_dist.config.settings import Config, to_yaml
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.files import needing_directory, write_atomically
from gpt_dist.parallel.watchdog import agent_id
from gpt_dist.parallel.world import World

FREE_ON_RESUME = {
    "out_dir", "device", "resume", "data.path", "data.tokenizer", "train.steps", "train.epochs",
    "train.batch_tokens", "train.micro_batch_size", "train.precision", "train.compile",
    "train.init_from", "train.eval_every", "train.eval_tokens", "train.checkpoint_every",
    "train.keep_checkpoints", "train.keep_every", "train.best_every", "train.sample_every",
    "train.profile", "eval.hellaswag_every", "eval.hellaswag_path",
    "parallel.strategy", "parallel.zero_stage", "parallel.offload", "parallel.deepspeed_config",
    "parallel.timeout",
}  # fmt: skip
"""Settings that a continued run may change. Data sets are compared by fingerprint, not by path."""

LOCK_WAIT = 5.0
"""Seconds to wait for the lock of a process that is about to end, and for a slow file system."""


class Start(NamedTuple):
    """The checkpoint that a run continues."""

    path: Path
    state: dict[str, Any]
    """Its ``state.json``."""


class RunDirectory:
    """A run's directory. Making one touches nothing; ``claim`` locks it until the block ends.

    A block that ends without having written anything leaves no directory behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = ExitStack()
        self._launch: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def claim(self, config: Config, fingerprint: str, world: World) -> Start | None:
        """Lock the directory and find where the run continues; None for a new run. Collective.

        World rank 0 holds the lock and decides, because another process may have written a later
        checkpoint before the lock was free, and because file systems differ in what they show.

        Args:
            config: the run's configuration.
            fingerprint: of its data sets.
            world: all of the run's ranks.

        Raises:
            UsageError: ``resume`` or a setting contradicts what the directory holds.
            GptDistError: another run is writing there, a rank does not see the directory, or the
                checkpoint is damaged.
        """
        self._launch = launch(world.gather(agent_id()))
        token = world.broadcast(world.decide(self._lock))
        world.together(lambda: check_shared(self.path, token))
        start: Start | None = world.broadcast(
            world.decide(lambda: self._find_start(config, fingerprint))
        )
        return start

    def write_config(self, config: Config) -> None:
        """Write the resolved ``config.yaml``, and which launch writes here from now on."""
        write_if_changed(self.path / "config.yaml", to_yaml(config).encode())
        write_if_changed(self.path / ".launch", json.dumps(self._launch).encode())

    def _lock(self) -> str:
        """Take the lock; returns a token by which other nodes recognise the directory."""
        self._held.enter_context(needing_directory(self.path))
        lock = self._held.enter_context(lock_file(self.path))
        self._held.callback(remove_lone_lock, self.path)  # while it is still locked
        token = uuid.uuid4().hex
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, {token}\n")
        lock.flush()
        os.fsync(lock.fileno())
        return token

    def _find_start(self, config: Config, fingerprint: str) -> Start | None:
        path = self._choose(config.resume)
        if path is None:
            return None
        state = read_state(path) if (path / "state.json").is_file() else {}
        if "sequences" not in state:  # imported, or exported
            raise UsageError(
                f"resume = {path}: these are weights without a run's state; start a new run "
                f"from them with --train.init_from {path}"
            )
        found = complete_checkpoints(self.path / "checkpoints")
        later = [checkpoint for checkpoint in found if step_of(checkpoint) > state["step"]]
        if later:
            raise UsageError(
                f"resume = {config.resume}: {self.path} holds later checkpoints "
                f"({later[-1].name}); choose another out_dir to branch off"
            )
        check_same_run(config, state, fingerprint, path)
        verify(path, state)
        return Start(path, state)

    def _choose(self, resume: str) -> Path | None:
        """The checkpoint that ``resume`` means."""
        newest = newest_checkpoint(self.path / "checkpoints")
        if resume == "auto" or (newest and self._is_restart()):
            return newest
        if resume == "never":
            if newest:
                raise UsageError(
                    f"resume = never: {self.path} already holds a run ({newest.name}); choose "
                    "another out_dir, or resume = auto to continue it"
                )
            return None
        return resolve(resume)

    def _is_restart(self) -> bool:
        """Whether this launch has written here before, so that it continues its own run."""
        try:
            before = json.loads((self.path / ".launch").read_text(encoding="utf-8"))
            return continues(self._launch, before)
        except (OSError, ValueError, TypeError, KeyError):  # no mark, or a damaged one
            return False


def launch(agents: list[str]) -> dict[str, Any]:
    """What tells this launch of the command from another one.

    Args:
        agents: the torchrun agent of each rank, "" without one.
    """
    return {
        "agents": sorted({agent for agent in agents if agent}),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def continues(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether a launch is an earlier one that was restarted, and not a second one by hand.

    When ranks crash or nodes join and leave, at least one torchrun agent remains. Slurm requeues a
    job under the same number and counts; inside one allocation the count stays the same.
    """
    if not set(now["agents"]).isdisjoint(before["agents"]):
        return True
    same_job = now["slurm_job"] and now["slurm_job"] == before["slurm_job"]
    return bool(same_job and now["slurm_restarts"] > before["slurm_restarts"])


def lock_file(directory: Path) -> TextIO:
    """The directory's ``.lock``, locked until it is closed.

    Raises:
        GptDistError: another process holds it.
    """
    path = directory / ".lock"
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        handle = path.open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                handle.seek(0)
                raise GptDistError(
                    f"{directory}: another run is writing here ({handle.read().strip()}); "
                    "stop it or choose another out_dir"
                ) from None
        else:
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle.fileno())):
                return handle
            # Its holder removed the file before we got the lock: lock the new one.
        handle.close()
        time.sleep(0.1)


def remove_lone_lock(directory: Path) -> None:
    """Remove ``.lock`` from a directory that holds nothing else."""
    if [path.name for path in directory.iterdir()] == [".lock"]:
        (directory / ".lock").unlink()


def check_shared(path: Path, token: str) -> None:
    """Check that this rank sees the directory which world rank 0 locked.

    Raises:
        GptDistError: it does not: ``out_dir`` is not on a shared file system.
    """
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            if token in (path / ".lock").read_text():
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise GptDistError(
                f"{path}: {socket.gethostname()} does not see what rank 0 wrote there; "
                "out_dir must be on a file system that all nodes share"
            )
        time.sleep(0.2)


def check_same_run(config: Config, state: dict[str, Any], fingerprint: str, source: Path) -> None:
    """Check that a checkpoint belongs to this configuration.

    Raises:
        UsageError: naming every setting that differs, with both values.
        GptDistError: the checkpoint's configuration cannot be read.
    """
    try:
        # Each setting alone: whether they fit together depends on the ranks, which may change.
        saved = Config.model_validate(state["config"])
    except ValidationError as error:
        raise GptDistError(f"{source}/state.json: {'; '.join(explain(error))}") from None
    problems = []
    for flag in flags():
        if flag in FREE_ON_RESUME:
            continue
        before, now = setting(saved, flag), setting(config, flag)
        if before != now:
            problems.append(f"{flag} = {now}: the run in {source} has {before}")
    if not problems and state["fingerprint"] != fingerprint:
        problems.append(
            f"data.path = {', '.join(config.data.path)}: not the data of the run in {source} "
            f"(fingerprint {fingerprint[:12]}, there {state['fingerprint'][:12]})"
        )
    if problems:
        problems[-1] += "; choose another out_dir for a new run"
        raise UsageError("\n".join(problems))


def setting(config: Config, flag: str) -> Any:
    """The value of a dotted setting."""
    value: Any = config
    for part in flag.split("."):
        value = getattr(value, part)
    return value


def write_if_changed(path: Path, data: bytes) -> None:
    """Write a file, but leave one alone that holds this already."""
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)
