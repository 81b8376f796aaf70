"""Loss curves of one or several runs in one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gpt_dist.errors import UsageError
from gpt_dist.training.reporting.metrics import whole_lines

FORMATS = (".png", ".pdf", ".svg")
COLORS = ("#2563eb", "#e8590c", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#846358", "#495057")
UNSEEN = 0.1
"""The share of a run, at its start, that may leave the picture at the top."""

Points = list[tuple[int, float]]


@dataclass
class Curve:
    """What is drawn of one run.

    Attributes:
        train: (step, training loss) of every step.
        smooth: the training loss averaged over its neighbours.
        validation: (step, validation loss), without step 0: an untrained model's loss says nothing,
            and a line from there to the next validation would cross the picture.
    """

    name: str
    train: Points
    smooth: list[float]
    validation: Points

    @property
    def best(self) -> tuple[int, float] | None:
        """The lowest validation loss and its step."""
        return min(self.validation, key=lambda point: point[1], default=None)

    @property
    def shown(self) -> list[float]:
        """The losses that must be inside the picture."""
        begin = int(len(self.smooth) * UNSEEN)
        return self.smooth[begin:] + [loss for _, loss in self.validation]


def plot_runs(runs: list[Path], out: Path) -> None:
    """Draw training and validation loss over steps, the best validation loss marked.

    Args:
        runs: run directories (with ``metrics.jsonl``).
        out: picture to write; the ending chooses png, pdf or svg.

    Raises:
        UsageError: a run has no metrics yet, or the ending is another.
    """
    if out.suffix not in FORMATS:
        raise UsageError(f"{out}: the picture's name must end in {', '.join(FORMATS)}")
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    curves = [read_curve(run, name) for run, name in zip(runs, names, strict=True)]
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        _draw(axes, curve, COLORS[number % len(COLORS)])
    low, high = _limits(curves)
    axes.set_ylim(low, high)
    axes.set_xlim(0, max(curve.train[-1][0] for curve in curves))
    _label(axes, curves, (low, high))
    axes.set_title(title(runs, names), loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def read_curve(run: Path, name: str) -> Curve:
    """The curve of a run directory.

    Raises:
        UsageError: it has no training steps.
    """
    rows = whole_lines(run / "metrics.jsonl")
    train = [(row["step"], row["train_loss"]) for row in rows if row.get("train_loss") is not None]
    if not train:
        raise UsageError(f"{run}: no training steps in metrics.jsonl; expected a run directory")
    validation = [
        (row["step"], row["val_loss"])
        for row in rows
        if row.get("val_loss") is not None and row["step"] > 0
    ]
    return Curve(name, train, smoothed([loss for _, loss in train]), validation)


def title(runs: list[Path], names: list[str]) -> str:
    """What the picture shows: one run's name, or the settings in which runs differ."""
    if len(runs) == 1:
        return f"{names[0]}: training and validation loss"
    differing = differing_settings(runs)
    by = f" by {', '.join(differing)}" if 0 < len(differing) <= 3 else f" of {len(runs)} runs"
    return f"Loss{by} (line: training, dots: validation)"


def differing_settings(runs: list[Path]) -> list[str]:
    """Keys of ``config.yaml`` whose values are not the same in all runs; ``out_dir`` aside."""
    configs = []
    for run in runs:
        path = run / "config.yaml"
        configs.append(_flat(yaml.safe_load(path.read_text())) if path.exists() else {})
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if key != "out_dir" and any(config.get(key) != configs[0].get(key) for config in configs)
    ]


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        is_section = isinstance(value, dict) and prefix + key != "data.path"
        flat |= _flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


def smoothed(values: list[float]) -> list[float]:
    """Each value on the straight line fitted to its neighbours, about 2 % of all values.

    The window is centred, so the curve does not lag. At both ends it shrinks to one side; there a
    fitted line still follows a slope, which a mean would not.
    """
    import numpy as np

    count = len(values)
    half = min(100, count // 100)
    if half < 1:
        return list(values)
    y = np.asarray(values)
    x = np.arange(count) - count / 2
    left = np.maximum(np.arange(count) - half, 0)
    right = np.minimum(np.arange(count) + half + 1, count)

    def mean(series: Any) -> Any:
        sums = np.concatenate([[0.0], np.cumsum(series)])
        return (sums[right] - sums[left]) / (right - left)

    mean_x, mean_y = mean(x), mean(y)
    slope = (mean(x * y) - mean_x * mean_y) / (mean(x * x) - mean_x**2)
    fitted: list[float] = (mean_y + slope * (x - mean_x)).tolist()
    return fitted


def _draw(axes: Any, curve: Curve, color: str) -> None:
    steps = [step for step, _ in curve.train]
    axes.plot(*zip(*curve.train, strict=True), color=color, alpha=0.18, linewidth=0.6)
    axes.plot(steps, curve.smooth, color=color, alpha=0.7, linewidth=1.2)
    if curve.best is None:
        return
    # Few points far apart are no curve: a line between them would show what nobody measured.
    line = "-" if len(curve.validation) > 3 else ""
    axes.plot(
        *zip(*curve.validation, strict=True), color=color, linestyle=line, linewidth=1.6,
        marker="o", markersize=3.5, clip_on=False, zorder=3,
    )  # fmt: skip
    axes.plot(
        *curve.best,
        color=color,
        marker="o",
        markersize=9,
        fillstyle="none",
        clip_on=False,
        zorder=3,
    )


def _limits(curves: list[Curve]) -> tuple[float, float]:
    """Lowest and highest loss of the picture: the fall of the first steps may leave it."""
    losses = [loss for curve in curves for loss in curve.shown]
    margin = 0.05 * (max(losses) - min(losses)) or 0.1
    return min(losses) - margin, max(losses) + margin


def _label(axes: Any, curves: list[Curve], limits: tuple[float, float]) -> None:
    """Name the curves and their best losses, right of the picture at their height."""
    low, high = limits
    labels = []
    for number, curve in enumerate(curves):
        color, end = COLORS[number % len(COLORS)], curve.smooth[-1]
        name = curve.name if len(curves) > 1 else "validation"
        if curve.best is not None:
            step, loss = curve.best
            labels.append((loss, f"{name}\nbest {loss:.4f} at step {step:,}", color))
        if curve.best is None or len(curves) == 1:
            name = curve.name if len(curves) > 1 else "training"
            labels.append((end, f"{name}\n{end:.2f} at the end", color))
    labels.sort(reverse=True)
    places = spread([(loss - low) / (high - low) for loss, _, _ in labels], 0.085)
    for place, (_, text, color) in zip(places, labels, strict=True):
        axes.text(
            1.02, place, text, color=color, fontsize=8.5, va="center", transform=axes.transAxes
        )


def spread(places: list[float], height: float) -> list[float]:
    """Move labels apart that are nearer than ``height``; ``places`` fall from 1 to 0."""
    places = list(places)
    for index in range(1, len(places)):
        places[index] = min(places[index], places[index - 1] - height)
    # That may have pushed the last ones out of the picture: back up from the bottom.
    places[-1] = max(places[-1], 0.0)
    for index in range(len(places) - 2, -1, -1):
        places[index] = max(places[index], places[index + 1] + height)
    return places
