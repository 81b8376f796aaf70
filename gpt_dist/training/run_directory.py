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
from typing import Any, Self, TextIO

from gpt_dist.checkpoints.directory import CheckpointDirectory
from gpt_dist.config.settings import Config, to_yaml
from gpt_dist.errors import GptDistError
from gpt_dist.files import needing_directory, write_atomically
from gpt_dist.parallel.watchdog import agent_id
from gpt_dist.parallel.world import World
from gpt_dist.training.starting_point import Start, find_start

LOCK_WAIT = 5.0
"""Seconds to wait for the lock of a process that is about to end, and for a slow file system."""


class RunDirectory:
    """A run's directory. Making one touches nothing; ``claim`` locks it until the block ends.

    A block that ends without having written anything leaves no directory behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = ExitStack()
        self._launch: dict[str, Any] = {}
        self._damaged: tuple[Path, ...] = ()

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
            GptDistError: another run is writing there, a rank does not see the directory, or no
                checkpoint is whole.
        """
        self._launch = launch(world.gather(agent_id()))
        token = world.broadcast(world.decide(self._lock))
        world.together(lambda: check_shared(self.path, token))
        start: Start | None = world.broadcast(
            world.decide(
                lambda: find_start(self.path, config, fingerprint, restarted=self._is_restart())
            )
        )
        self._damaged = start.damaged if start else ()
        return start

    def write_config(self, config: Config) -> None:
        """Write the resolved ``config.yaml``, and which launch writes here from now on.

        Damaged checkpoints are renamed here and not in ``claim``, so that a run that fails to start
        changes nothing.
        """
        checkpoints = self.path / "checkpoints"
        CheckpointDirectory(checkpoints, config.train.keep_checkpoints).set_aside(self._damaged)
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


def write_if_changed(path: Path, data: bytes) -> None:
    """Write a file, but leave one alone that holds this already."""
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)
