"""launch/slurm on a real Slurm cluster of two nodes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from gpt_dist.checkpoints.checkpoint import complete_checkpoints
from gpt_dist.data.shards import write_shard
from tests.cluster.conftest import ROOT, processes_with
from tests.cluster.slurm_cluster import SlurmCluster
from tests.conftest import read_rows, run_train, step_count, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Config = Callable[..., Path]
TRAIN = str(ROOT / "launch/slurm/train.sbatch")
NO_GPUS = "--gres=none"


def log_of(cwd: Path) -> str:
    return "\n".join(log.read_text(errors="replace") for log in sorted(cwd.glob("*.log")))


def send(number: signal.Signals, out: Path) -> None:
    """Send a signal to both ranks of a run."""
    started = [p for p in psutil.process_iter(["cmdline"]) if str(out) in (p.info["cmdline"] or ())]
    ranks = [process for process in started if "RANK" in process.environ()]
    assert len(ranks) == 2, started
    for rank in ranks:
        rank.send_signal(number)


@pytest.mark.slow(110)
def test_time_limit_checkpoints_requeues_and_finishes(
    slurm: SlurmCluster, tiny_config: Config, tmp_path: Path
) -> None:
    """A run that its time limit cuts in two equals an uncut one."""
    config = tiny_config(
        model={"dropout": 0.1},
        optim={"schedule": "constant"},
        train={"steps": 1_000_000, "batch_tokens": 8192, "checkpoint_every": 0, "eval_every": 0},
    )
    out = tmp_path / "cut"
    job = slurm.sbatch(
        NO_GPUS, "--time=30", "--signal=B:USR1@40",
        TRAIN, "--config", str(config), "--out_dir", str(out), "--resume", "never", cwd=tmp_path,
    )  # fmt: skip
    # The limit comes closer when the run is under way, however long its start took. Slurm looks
    # at limits every 30 s: the signal comes within that time, and the end another 30 s later. Until
    # then the ranks sleep, because the steps would have to be repeated below.
    wait_until(lambda: step_count(out) > 5, "step 5")
    slurm.update(job, f"EndTime={datetime.now() + timedelta(seconds=40):%FT%T}")
    send(signal.SIGSTOP, out)
    wait_until(lambda: "time is nearly up" in log_of(tmp_path), "the signal")
    send(signal.SIGCONT, out)
    slurm.wait(job, "PENDING", "COMPLETED", "FAILED", "TIMEOUT")
    assert slurm.job(job)["JobState"] == "PENDING", log_of(tmp_path)
    slurm.update(job, "TimeLimit=30")
    (checkpoint,) = complete_checkpoints(out / "checkpoints")
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    assert stopped_at == step_count(out)
    # The second half is short, however fast this machine is.
    settings = yaml.safe_load(config.read_text())
    settings["train"]["steps"] = stopped_at + 20
    config.write_text(yaml.safe_dump(settings))
    final = slurm.wait(job)
    log = log_of(tmp_path)
    assert (final["JobState"], final["Restarts"]) == ("COMPLETED", "1"), log
    assert "start 1: 2 nodes (node[1-2])" in log
    assert f"continuing {checkpoint}" in log
    assert "Traceback" not in log

    assert "2 ranks ×" in log
    run_train(config, tmp_path / "quiet", ranks=2)
    assert read_rows(out, timing=False) == read_rows(tmp_path / "quiet", timing=False)


@pytest.mark.slow(25)
def test_sigterm_during_evaluation_is_honoured_within_the_grace(
    slurm: SlurmCluster, tiny_config: Config, tiny_data: Path, tmp_path: Path
) -> None:
    val_tokens = np.random.default_rng(0).integers(0, 8, 20_000_000, dtype=np.uint16)
    data = tmp_path / "data"
    data.mkdir()
    for file in tiny_data.iterdir():
        if "_val_" not in file.name:
            (data / file.name).symlink_to(file)
    write_shard(data / "x_val_000000.bin", val_tokens)
    config = tiny_config(
        data={"path": str(data), "tokenizer": str(data)},
        optim={"schedule": "constant", "warmup_steps": 0},
    )
    out = tmp_path / "run"
    run_train(config, out, "--train.steps", "2", "--train.eval_tokens", "64")
    job = slurm.sbatch(
        NO_GPUS, TRAIN, "--config", str(config), "--out_dir", str(out),
        "--train.steps", "30", "--train.eval_every", "13", "--train.eval_tokens", "null",
        cwd=tmp_path,
    )  # fmt: skip
    wait_until(lambda: step_count(out) == 13, "step 13")
    time.sleep(2)  # into the evaluation of 20 million tokens, which takes minutes
    slurm.cancel(job)
    wait_until(lambda: not processes_with(str(out)), "the ranks to end")
    # Ranks that had not ended by themselves within KillWait would have been killed without a word.
    wait_until(lambda: "stopped after step 13" in log_of(tmp_path), "the last words")
    assert complete_checkpoints(out / "checkpoints")[-1].name == "step-00000013"


@pytest.mark.slow(25)
def test_sweep_runs_every_pair_and_prepare_uses_srun(
    slurm: SlurmCluster, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(train={"steps": 2, "eval_every": 0}, optim={"warmup_steps": 0})
    sweep = slurm.sbatch(
        NO_GPUS, "--array=0-2", str(ROOT / "launch/slurm/array-sweep.sbatch"),
        "--config", str(config),
        cwd=tmp_path,
        env={"LEARNING_RATES": "1e-3 2e-3", "SEEDS": "5", "LAUNCH_DIR": str(ROOT / "launch")},
    )  # fmt: skip
    prepare = slurm.sbatch(
        str(ROOT / "launch/slurm/prepare.sbatch"),
        "shakespeare", "--tokenizer", "char", "--out", str(tmp_path / "shakespeare"),
        cwd=tmp_path,
    )  # fmt: skip
    assert slurm.wait(prepare)["JobState"] == "COMPLETED", log_of(tmp_path)
    assert list((tmp_path / "shakespeare").glob("*_train*.bin"))
    wait_until(lambda: not slurm.queue(), "the sweep to end")
    runs = {
        path.parent.name: yaml.safe_load(path.read_text())
        for path in (tmp_path / f"runs/sweep-{sweep}").glob("*/config.yaml")
    }
    assert {name: (run["optim"]["lr"], run["seed"]) for name, run in runs.items()} == {
        "lr-1e-3-seed-5": (1e-3, 5),
        "lr-2e-3-seed-5": (2e-3, 5),
    }, log_of(tmp_path)
    assert "nothing to do" in log_of(tmp_path)
