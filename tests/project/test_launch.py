"""The launch scripts: shellcheck, directives that Slurm reads, flags that are passed on."""

from __future__ import annotations

import importlib
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_dist.checkpoints.checkpoint import complete_checkpoints
from tests.conftest import BIN, step_count, wait_until

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for pattern in ("launch/**/*.sh", "launch/**/*.sbatch", "tests/cluster/*.sh")
    for path in ROOT.glob(pattern)
)
BATCH_SCRIPTS = [path for path in SCRIPTS if path.suffix == ".sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    done = subprocess.run([str(BIN / "shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def directive_problems(text: str) -> list[str]:
    """Lines that look like directives but that sbatch would silently skip.

    It reads the lines that begin with exactly ``#SBATCH``, up to the first line that is neither
    empty nor a comment.
    """
    problems, header = [], True
    for number, line in enumerate(text.splitlines(), 1):
        header = header and (not line.strip() or line.startswith("#"))
        if not re.match(r"\s*#\s*SBATCH\b|\s*#sbatch\b", line):
            continue
        if not header:
            problems.append(f"line {number}: after the first command")
        elif not re.fullmatch(r"#SBATCH --?[A-Za-z-]+([= ]\S+)?", line):
            problems.append(f"line {number}: not `#SBATCH --option=value`: {line}")
    return problems


@pytest.mark.parametrize("script", BATCH_SCRIPTS, ids=lambda path: path.name)
def test_slurm_reads_every_directive(script: Path) -> None:
    text = script.read_text()
    assert directive_problems(text) == []
    assert "#SBATCH --requeue" in text.splitlines()


@pytest.mark.parametrize(
    "line", ["# SBATCH --nodes=2", "#sbatch --nodes=2", " #SBATCH --nodes=2", "#SBATCH nodes=2"]
)
def test_the_lint_sees_what_slurm_skips(line: str) -> None:
    assert directive_problems(f"#!/bin/bash\n{line}\n")
    assert directive_problems("#!/bin/bash\nset -e\n#SBATCH --nodes=2\n")
    assert not directive_problems("#!/bin/bash\n# a comment\n\n#SBATCH --nodes=2\nset -e\n")


def run_local(directory: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run launch/local.sh with a torchrun that only prints its arguments."""
    fake = directory / "bin"
    fake.mkdir(exist_ok=True)
    (fake / "torchrun").write_text(
        '#!/bin/sh\necho "threads $OMP_NUM_THREADS"\nprintf "%s\\n" "$@"\n'
    )
    (fake / "torchrun").chmod(0o755)
    path = f"{fake}:{os.environ['PATH']}"
    clean = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [str(ROOT / "launch/local.sh"), *flags],
        env=clean | {"PATH": path} | environment,
        cwd=directory,
        capture_output=True,
        text=True,
    )


def test_local_passes_flags_through(tmp_path: Path) -> None:
    lines = run_local(tmp_path, "--data.path", "my data", NPROC_PER_NODE="3").stdout.splitlines()
    assert "--nproc-per-node=3" in lines
    assert "--standalone" in lines
    assert lines[-4:] == ["-m", "gpt_dist.train", "--data.path", "my data"]
    assert int(lines[0].split()[1]) == max(1, (os.cpu_count() or 1) // 3)
    wrong = run_local(tmp_path, NPROC_PER_NODE="two")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: NPROC_PER_NODE = two: expected a whole number, 1 or more\n"


@pytest.mark.slow
def test_sigusr1_to_torchrun_checkpoints(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny_config(train={"steps": 100_000, "checkpoint_every": 0, "eval_every": 0})
    process = subprocess.Popen(
        [str(ROOT / "launch/local.sh"), "--config", str(config), "--out_dir", str(out)],
        env=os.environ | {"NPROC_PER_NODE": "2", "PATH": f"{BIN}:{os.environ['PATH']}"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: step_count(out) >= 5, "step 5", agent=process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    rows = step_count(out)
    assert f"stopped after step {rows}; run the same command to resume" in output
    (checkpoint,) = complete_checkpoints(out / "checkpoints")
    assert checkpoint.name == f"step-{rows:08d}"


@pytest.mark.slow(2)
def test_the_tables_in_the_docs_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    model = importlib.import_module("scaling_model")
    page = (ROOT / "docs/cluster.md").read_text()
    assert model.report() in page, "python benchmarks/scaling.py --model"
    assert model.memory_report() in page, "python benchmarks/scaling.py --memory"
    sys.modules.pop("scaling_model")


def test_computed_scaling_agrees_with_published_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within three points of MosaicML's figures at every size, with one fitted constant."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    model = importlib.import_module("scaling_model")
    penalty, shares = model.published_check()
    assert shares[128][0] == pytest.approx(0.91, abs=0.005)
    for gpus, (published, computed) in shares.items():
        assert computed >= published  # the computed figures leave out waiting
        corrected = computed / (1 + penalty * math.log2(gpus / 8))
        assert corrected == pytest.approx(published, abs=0.03), gpus
    sys.modules.pop("scaling_model")
