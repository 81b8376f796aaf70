"""Loss curves of one or several runs in one picture."""

from __future__ import annotations

from pathlib import Path

from gpt_dist.errors import UsageError
from gpt_dist.training.metrics import whole_lines

FORMATS = (".png", ".pdf", ".svg")


def plot_runs(runs: list[Path], out: Path) -> None:
    """Draw training and validation loss over steps.

    Args:
        runs: run directories (with ``metrics.jsonl``).
        out: picture to write; the ending chooses png, pdf or svg.

    Raises:
        UsageError: a run has no metrics yet, or the ending is another.
    """
    if out.suffix not in FORMATS:
        raise UsageError(f"{out}: the picture's name must end in {', '.join(FORMATS)}")
    curves = {run: whole_lines(run / "metrics.jsonl") for run in runs}
    for run, rows in curves.items():
        if not any(row.get("train_loss") is not None for row in rows):
            raise UsageError(f"{run}: no training steps in metrics.jsonl; expected a run directory")
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, (run, rows) in enumerate(curves.items()):
        color = f"C{number % 10}"
        name = f"{run.name} " if len(runs) > 1 else ""
        train = [(row["step"], row["train_loss"]) for row in rows if row.get("train_loss")]
        validation = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss")]
        axes.plot(*zip(*train, strict=True), color=color, alpha=0.25, linewidth=0.8)
        smooth = _smoothed([loss for _, loss in train])
        axes.plot(
            [step for step, _ in train], smooth, color=color, linewidth=1.4, label=f"{name}train"
        )
        if validation:
            best = min(loss for _, loss in validation)
            axes.plot(
                *zip(*validation, strict=True),
                color=color,
                linestyle="--",
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                label=f"{name}validation (best {best:.4f})",
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(runs[0].resolve().name if len(runs) == 1 else "loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out)


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over about a hundredth of the run, start bias removed."""
    decay = 1 - 1 / max(1.0, min(100.0, len(values) / 100))
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(mean / weight)
    return smooth
