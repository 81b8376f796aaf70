"""``out_dir``: one writer at a time, one configuration for good, and where a run continues."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from gpt_dist.checkpoints.checkpoint import (
    complete_checkpoints,
    newest_checkpoint,
    read_state,
    resolve,
    verify,
)
from gpt_dist.config.command_line import build, flags, parse_yaml
from gpt_dist.config.settings import Config, to_yaml
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.files import write_atomically
from gpt_dist.parallel.world import World

FREE_ON_RESUME = {
    "out_dir", "device", "resume", "data.path", "data.tokenizer", "train.steps", "train.epochs",
    "train.batch_tokens", "train.micro_batch_size", "train.precision", "train.compile",
    "train.init_from", "train.eval_every", "train.eval_tokens", "train.checkpoint_every",
    "train.keep_checkpoints", "train.sample_every", "train.profile", "eval.hellaswag_every",
    "eval.hellaswag_path", "parallel.strategy", "parallel.zero_stage", "parallel.offload",
    "parallel.deepspeed_config", "parallel.timeout",
}  # fmt: skip
"""Settings that a continued run may change. Data sets are compared by fingerprint, not by path."""

LOCK_WAIT = 5.0
"""Seconds to wait for a writer that is just dying."""


class RunDirectory:
    """World rank 0's hold on a run's directory; the lock lasts as long as the process.

    Raises:
        GptDistError: the directory cannot be made or written, or another run is writing to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        lock = path / ".lock"
        self._handle = lock.open("a+")
        deadline = time.monotonic() + LOCK_WAIT
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._handle.seek(0)
                    raise GptDistError(
                        f"{path}: another run is writing here ({self._handle.read().strip()}); "
                        "stop it or choose another out_dir"
                    ) from None
                time.sleep(0.1)
        # The token lets the other nodes check that they see this very directory.
        self.token = uuid.uuid4().hex
        self._handle.truncate(0)
        self._handle.write(f"process {os.getpid()} on {socket.gethostname()}, {self.token}\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        self._handle.close()


def check_shared(path: Path, token: str) -> None:
    """That this rank sees the directory which world rank 0 locked.

    Raises:
        GptDistError: it does not: ``out_dir`` is not on a shared file system.
    """
    deadline = time.monotonic() + LOCK_WAIT  # network file systems may lag
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


def find_start(config: Config, world: World) -> Path | None:
    """The checkpoint that the run continues from, verified; None for a fresh start.

    Raises:
        UsageError: ``resume`` contradicts what the directory holds.
        GptDistError: the checkpoint is damaged.
    """
    checkpoints = Path(config.out_dir) / "checkpoints"
    newest = newest_checkpoint(checkpoints)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if config.resume == "auto" or (restarted and newest):
        start = newest
    elif config.resume == "never":
        if newest:
            raise UsageError(
                f"resume = never: {config.out_dir} already holds a run ({newest.name}); choose "
                "another out_dir, or resume = auto to continue it"
            )
        start = None
    else:
        start = resolve(config.resume)
        later = [c for c in complete_checkpoints(checkpoints) if c.name > start.name]
        if later:
            raise UsageError(
                f"resume = {config.resume}: {config.out_dir} holds later checkpoints "
                f"({later[-1].name}); choose another out_dir to branch off"
            )
    if start is not None and world.is_main:
        verify(start, read_state(start))
    return start


def check_same_run(config: Config, state: dict[str, Any], fingerprint: str, source: Path) -> None:
    """That a checkpoint belongs to this configuration.

    Raises:
        UsageError: naming every setting that differs, with both values.
    """
    saved = build(state["config"])
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


def write_config(config: Config) -> None:
    """Write the resolved ``config.yaml``."""
    path = Path(config.out_dir) / "config.yaml"
    text = to_yaml(config).encode()
    if not path.exists() or path.read_bytes() != text:
        write_atomically(path, text)


def read_config(path: Path) -> Config:
    """The resolved configuration of a run directory."""
    return build(parse_yaml((path / "config.yaml").read_text(encoding="utf-8")))
