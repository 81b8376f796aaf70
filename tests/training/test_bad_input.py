"""Failures of runs and of processes: one line, the right exit status, the disk as it was.

What can be told from a command line alone is in ``tests/commands/mistakes.txt``.
"""

from __future__ import annotations

import fcntl
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import make_dataset, run_train, start_train, train_command, words

pytestmark = pytest.mark.slow
Config = Callable[..., Path]


def snapshot(directory: Path) -> dict[str, bytes]:
    """Path and content of every file below a directory, without locks."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def refused(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    """Check the exit status, and that the only line is an error with all these parts."""
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], (part, lines[0])


@pytest.fixture
def finished(tiny_config: Config, tmp_path: Path) -> tuple[Path, Path]:
    """A configuration and its finished run."""
    config = tiny_config()
    run_train(config, tmp_path / "run")
    return config, tmp_path / "run"


def test_another_runs_directory(finished: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = finished
    before = snapshot(run)
    done = run_train(config, run, "--model.n_embd", "64", check=False)
    refused(done, 2, "model.n_embd = 64", "has 32")
    done = run_train(config, run, "--optim.lr", "1e-3", "--seed", "2", check=False)
    assert done.returncode == 2
    assert "seed = 2: the run in" in done.stderr
    assert "optim.lr = 0.001" in done.stderr
    assert f"--train.init_from {run}" in done.stderr
    other = make_dataset(tmp_path / "other", words(9_000, 7), words(500, 8))
    flags = ["--data.path", str(other), "--data.tokenizer", str(other), "--train.steps", "30"]
    refused(run_train(config, run, *flags, check=False), 2, "not the data of the run", str(other))
    done = run_train(config, run, "--resume", "never", check=False)
    refused(done, 2, "resume = never", "already holds a run (step-00000020)")
    done = run_train(config, run, "--resume", str(run / "checkpoints/step-00000010"), check=False)
    refused(done, 2, "later checkpoints (step-00000020)", "another out_dir")
    assert snapshot(run) == before


def test_no_whole_checkpoint(finished: tuple[Path, Path]) -> None:
    config, run = finished
    for step in (10, 20):
        file = run / f"checkpoints/step-000000{step}/optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    before = snapshot(run)
    done = run_train(config, run, "--train.steps", "30", check=False)
    refused(done, 1, str(file), "no earlier checkpoint is whole")
    assert snapshot(run) == before


def test_a_second_writer(finished: tuple[Path, Path]) -> None:
    config, run = finished
    before = snapshot(run)
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_train(config, run, "--train.steps", "30", check=False)
    refused(done, 1, str(run), "another run is writing here")
    assert snapshot(run) == before


def test_a_full_disk(finished: tuple[Path, Path]) -> None:
    config, run = finished
    full = start_train(config, run, "--train.steps", "60")
    # To the program this is a full disk.
    resource.prlimit(full.commands[0].pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    refused(full.completed(), 1, "checkpoint not written", "safetensors", "step-00000020")
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert sorted(names) == ["best", "step-00000010", "step-00000020"]
    run_train(config, run, "--train.steps", "60")  # with room again it continues


def test_tokens_beyond_the_vocabulary(tiny_config: Config, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    shard = tmp_path / "data" / "x_train_000000.bin"
    content = shard.read_bytes()
    beyond = np.full(120_000, 200, np.uint16).tobytes()
    shard.write_bytes(content[:1024] + beyond[: len(content) - 1024])
    flags = ["--data.path", str(tmp_path / "data"), "--data.tokenizer", str(tmp_path / "data")]
    refused(run_train(tiny_config(), tmp_path / "run", *flags, check=False), 1, str(shard))


def test_ranks_fail_together_and_one_prints(tiny_config: Config, tmp_path: Path) -> None:
    for flags, text in (
        (["--train.batch_tokens", "1056"], "must be a multiple"),
        (["--data.path", str(tmp_path / "none")], "no data there"),
        (["--parallel.strategy", "deepspeed", "--parallel.zero_stage", "7"], "0 | 1 | 2 | 3"),
    ):
        done = run_train(tiny_config(), tmp_path / "run", *flags, ranks=2, check=False)
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert text in errors[0]
        assert not (tmp_path / "run").exists()


def test_torchrun_does_not_restart_a_usage_error(tiny_config: Config, tmp_path: Path) -> None:
    """Which all ranks find together: one that is alone on the command line ends the same way."""
    command = train_command(tiny_config(), tmp_path / "run", "--data.path", "nothing", ranks=2)
    command.insert(1, "--max-restarts=3")
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "no data there" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_interface_that_does_not_exist(tiny_config: Config, tmp_path: Path) -> None:
    import os

    done = run_train(
        tiny_config(), tmp_path / "run", ranks=2, check=False,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "eth77"},
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors
    assert "GLOO_SOCKET_IFNAME = eth77" in errors[0]
    assert done.returncode != 0


def test_dry_run_writes_nothing(tiny_config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run_train(tiny_config(), out, "--dry-run")
    for word in ("parameters", "memory", "steps", "tokens", "checkpoint"):
        assert word in done.stdout
    assert not out.exists()


def test_plot(tmp_path: Path) -> None:
    def plot(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gpt_dist.plot", *argv]
        return subprocess.run(command, capture_output=True, text=True)

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        # No steep start, which may leave the picture.
        rows = [{"step": n, "train_loss": 4 - n**2 / 500} for n in range(1, 30)]
        rows += [{"step": n, "val_loss": 4.1 - n**2 / 500} for n in range(10, 30, 10)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    for ending, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        out = tmp_path / f"both.{ending}"
        done = plot(str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert out.read_bytes().startswith(magic)
    svg = (tmp_path / "both.svg").read_text()
    # Matplotlib writes text as outlines, with the text itself in a comment.
    assert svg.count("<!-- best 3.3000 at step 20 -->") == 2
    for text in ("a", "b", "optimizer step", "loss (nats per token)"):
        assert f"<!-- {text} -->" in svg, text
    # A line is "M x y L x y …"; y grows downward. Each run has 29 steps, drawn raw and smoothed.
    lines = [
        np.array([point.split() for point in re.split("[ML]", path)[1:]], float)
        for path in re.findall(r'<path d="(M [^CQzZ"]+)"', svg)
    ]
    steps = np.arange(1, 30)
    curves = [line for line in lines if len(line) == len(steps)]
    assert len(curves) == 4
    for curve in curves:
        assert np.corrcoef(curve[:, 0], steps)[0, 1] == pytest.approx(1)
        assert np.corrcoef(curve[:, 1], -(steps**2))[0, 1] == pytest.approx(-1)
    refused(plot(str(tmp_path / "a"), "--out", str(tmp_path / "a.gif")), 2, ".png, .pdf, .svg")
    refused(plot(str(tmp_path)), 2, "no training steps")
