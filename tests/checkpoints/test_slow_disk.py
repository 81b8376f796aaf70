"""A disk may be slower than ``parallel.timeout``: the ranks that do not write wait for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_dist.checkpoints.checkpoint import complete_checkpoints
from tests import warm
from tests.conftest import column


@pytest.mark.slow(30)
def test_ranks_wait_for_a_slow_disk(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Twice: before the checkpoint of step 20, and at the end of the run."""
    flags = ["--config", str(tiny_config(train={"eval_every": 0})), "--parallel.timeout", "3"]
    arguments = ["8", *flags, "--out_dir", str(tmp_path / "run")]
    done = warm.run_ranks("tests.checkpoints.slow_disk", arguments, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")]
    assert steps == ["step-00000010", "step-00000020"]
    assert len(column(tmp_path / "run", "train_loss")) == 20
