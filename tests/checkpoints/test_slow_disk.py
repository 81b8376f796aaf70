"""A disk may be slower than ``parallel.timeout``: the ranks that do not write wait for it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_dist.checkpoints.checkpoint import complete_checkpoints
from tests.conftest import BIN, column


@pytest.mark.slow(30)
def test_ranks_wait_for_a_slow_disk(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Twice: before the checkpoint of step 20, and at the end of the run."""
    start = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
    script = [str(Path(__file__).with_name("slow_disk.py")), "8"]
    flags = ["--config", str(tiny_config(train={"eval_every": 0})), "--parallel.timeout", "3"]
    done = subprocess.run(
        [*start, *script, *flags, "--out_dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")]
    assert steps == ["step-00000010", "step-00000020"]
    assert len(column(tmp_path / "run", "train_loss")) == 20
