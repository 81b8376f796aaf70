"""A run that is killed ten times ends bit for bit like one that is not."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import run_train, train_command
from tests.training.test_training import assert_same_run, read_rows_loosely

Config = Callable[..., Path]
KILLS = 10


def processes(out: Path) -> list[psutil.Process]:
    """Live processes of a run: torchrun and its ranks."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        arguments = process.info["cmdline"] or []
        if str(out) in arguments and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def is_agent(process: psutil.Process) -> bool:
    return any(part.endswith("torchrun") for part in process.cmdline())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ten_kills_change_nothing(tiny_config: Config, tmp_path: Path, ranks: int) -> None:
    steps = 120
    config = tiny_config(
        model={"dropout": 0.2},
        train={"steps": steps, "checkpoint_every": 5, "eval_every": 20, "batch_tokens": 2048},
    )
    quiet, out = tmp_path / "quiet", tmp_path / "killed"
    run_train(config, quiet, ranks=ranks)
    generator = random.Random(ranks)
    command = train_command(config, out, ranks=ranks)
    for kill in range(KILLS):
        agent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kill % 5 == 4:  # during start-up
            time.sleep(generator.uniform(0.5, 3))
        else:  # within the next steps, perhaps while a checkpoint is written
            goal = rows(out) + generator.randint(3, 12)
            deadline = time.monotonic() + 120
            while rows(out) < goal and agent.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        alive = processes(out)
        if alive:
            agents = [process for process in alive if is_agent(process)]
            workers = [process for process in alive if not is_agent(process)]
            victims = agents if kill % 2 or not workers else workers
            generator.choice(victims or alive).kill()
        agent.wait(timeout=60)
        deadline = time.monotonic() + 60
        while left := processes(out):
            assert time.monotonic() < deadline, left  # no rank outlives its agent
            time.sleep(0.05)
    assert rows(out) < steps  # the kills came while it was running
    run_train(config, out, ranks=ranks)
    assert_same_run(quiet, out)
    assert (out / "checkpoints/best").resolve().name == (quiet / "checkpoints/best").resolve().name


def rows(out: Path) -> int:
    return len(read_rows_loosely(out)) if (out / "metrics.jsonl").exists() else 0
