"""A run whose ranks are killed again and again ends bit for bit like one that is not.

What torchrun does when it or its ranks are killed is shown in tests/cluster/test_faults.py.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import run_train, start_train, step_count, wait_until
from tests.training.test_training import assert_same_run

RANKS, KILLS = 4, 3


@pytest.mark.slow(30)
def test_kills_change_nothing(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    config = tiny_config(  # ends only by being killed, however fast the machine is
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
    generator = random.Random(4)
    for kill in range(KILLS):
        run = start_train(config, out, ranks=RANKS)
        if kill == 1:  # somewhere in the start-up
            time.sleep(generator.uniform(0, 1))
        else:  # somewhere in the next steps, a checkpoint's writing among them
            goal = step_count(out) + generator.randint(3, 12)
            wait_until(lambda goal=goal: step_count(out) >= goal, f"step {goal}", agent=run)
        generator.choice(run.commands).send_signal(signal.SIGKILL)
        assert run.wait() == 1
    steps = str(step_count(out) + 10)
    run_train(config, out, "--train.steps", steps, ranks=RANKS)
    run_train(config, tmp_path / "quiet", "--train.steps", steps, ranks=RANKS)
    assert_same_run(tmp_path / "quiet", out)
    best = [(run / "checkpoints/best").resolve().name for run in (out, tmp_path / "quiet")]
    assert best[0] == best[1]
