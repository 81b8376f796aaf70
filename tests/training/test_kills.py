"""A run that is killed again and again ends bit for bit like one that is not."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import run_train, step_count, train_command, wait_until
from tests.training.test_training import assert_same_run

Config = Callable[..., Path]
RANKS, KILLS = 4, 2  # tests/cluster/test_faults.py injects more into 2 ranks


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


def endless(config: Callable[..., Path]) -> Path:
    """A run that ends only by being killed, however fast the machine is."""
    return config(
        model={"dropout": 0.2},
        optim={"schedule": "constant", "warmup_steps": 5},
        train={
            "steps": 1_000_000,
            "checkpoint_every": 5,
            "eval_every": 20,
            "batch_tokens": 2048,
            "micro_batch_size": 16,
        },
    )


@pytest.mark.slow(50)
def test_kills_change_nothing(tiny_config: Config, tmp_path: Path) -> None:
    config, out = endless(tiny_config), tmp_path / "killed"
    generator = random.Random(4)
    command = train_command(config, out, ranks=RANKS)
    for kill in range(KILLS):
        agent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kill == KILLS - 1:  # somewhere in the start-up
            time.sleep(generator.uniform(0.5, 3))
        else:  # somewhere in the next steps, a checkpoint's writing among them
            goal = step_count(out) + generator.randint(3, 12)
            wait_until(lambda goal=goal: step_count(out) >= goal, f"step {goal}", agent=agent)
        alive = processes(out)
        agents = [process for process in alive if is_agent(process)]
        workers = [process for process in alive if not is_agent(process)]
        victims = agents if kill % 2 or not workers else workers
        generator.choice(victims).kill()
        agent.wait(timeout=120)
        wait_until(lambda: not processes(out), "every rank to end with the agent")
    steps = str(step_count(out) + 10)
    run_train(config, out, "--train.steps", steps, ranks=RANKS)
    run_train(config, tmp_path / "quiet", "--train.steps", steps, ranks=RANKS)
    assert_same_run(tmp_path / "quiet", out)
    best = [(run / "checkpoints/best").resolve().name for run in (out, tmp_path / "quiet")]
    assert best[0] == best[1]
