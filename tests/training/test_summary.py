"""The last lines of a run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gpt_dist.training.reporting.monitor import profiler
from gpt_dist.training.reporting.summary import next_commands, summary
from tests.training.test_curves import write_run


def checkpoints(run: Path, steps: list[int], best: int | None = None) -> None:
    for step in steps:
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    if best is not None:
        (run / "checkpoints/best").symlink_to(f"step-{best:08d}")


def test_losses_duration_and_commands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", validation={0: 4.2, 200: 1.25, 400: 1.375})
    checkpoints(run, [200, 400], best=200)
    lines = summary(run, 0, 77.3).splitlines()
    assert lines[:4] == [
        "done: 400 steps in 0:01:17",
        "training loss    1.0001",
        "validation loss  1.3750, best 1.2500 at step 200",
        f"curves           {run}/loss.png",
    ]
    # The best model, and a path that a shell takes as one word.
    for line, module in zip(lines[-2:], ("gpt_dist.generate", "serve"), strict=True):
        path = str(run / "checkpoints/best")
        assert shlex.split(line) == ["python", "-m", module, "--checkpoint", path]


def test_a_resumed_run_whose_last_loss_is_the_best(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", validation={200: 1.25, 400: 1.125})
    checkpoints(run, [200, 400], best=400)
    lines = summary(run, 100, 7300).splitlines()
    assert lines[0] == "done: 400 steps in 2:01:40, resumed at step 100"
    assert lines[2] == "validation loss  1.1250"
    assert lines[-1] == f"  python -m serve --checkpoint {run}"


def test_a_run_without_validation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", validation={})
    checkpoints(run, [400])
    assert [line.split()[0] for line in summary(run, 0, 1).splitlines()][:3] == [
        "done:", "training", "curves",
    ]  # fmt: skip
    assert next_commands(run).endswith(f" --checkpoint {run}")


@pytest.mark.parametrize(("steps", "said"), [(14, "/profile/trace.json (open it in"), (8, "none")])
def test_the_profiler_says_where_its_trace_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, said: str
) -> None:
    with profiler(tmp_path, enabled=True) as trace:
        for _ in range(steps):
            trace.step()
    assert said in capsys.readouterr().out
    assert (tmp_path / "profile/trace.json").exists() == (steps > 9)
