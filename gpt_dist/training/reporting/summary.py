"""The last lines of a run: what came out, and the commands that use it."""

from __future__ import annotations

import shlex
from pathlib import Path

from gpt_dist.checkpoints.checkpoint import newest_checkpoint
from gpt_dist.training.reporting.curves import read_curve
from gpt_dist.training.reporting.formatting import clock


def summary(run: Path, first_step: int, seconds: float) -> str:
    """Losses and duration of a run that is complete.

    Args:
        run: its directory.
        first_step: the step at which this start of it began.
        seconds: what this start took.

    Raises:
        UsageError: the run has no training steps.
    """
    curve = read_curve(run, "")
    last, loss = curve.train[-1]
    resumed = f", resumed at step {first_step:,}" if first_step else ""
    lines = [f"done: {last:,} steps in {clock(seconds)}{resumed}", f"training loss    {loss:.4f}"]
    if curve.best is not None:
        step, best = curve.best
        where = "" if step == last else f", best {best:.4f} at step {step:,}"
        lines.append(f"validation loss  {curve.validation[-1][1]:.4f}{where}")
    lines += [f"curves           {run / 'loss.png'}", next_commands(run)]
    return "\n".join(lines)


def next_commands(run: Path) -> str:
    """Commands that use the model of a run: its best checkpoint where that is not the newest."""
    best, newest = run / "checkpoints" / "best", newest_checkpoint(run / "checkpoints")
    is_older = newest is not None and best.exists() and best.resolve() != newest.resolve()
    path = shlex.quote(str(best if is_older else run))
    return (
        "next:\n"
        f"  python -m gpt_dist.generate --checkpoint {path}\n"
        f"  python -m serve --checkpoint {path}"
    )
