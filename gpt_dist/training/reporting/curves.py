"""Loss curves of one or several runs in one picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gpt_dist.errors import UsageError
from gpt_dist.training.reporting.formatting import short_names
from gpt_dist.training.reporting.metrics import whole_lines

FORMATS = (".png", ".pdf", ".svg")
COLORS = ("#2563eb", "#e8590c", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#846358", "#495057")
GREY = "#495057"
UNSEEN = 0.1
"""Share of a run, at its start, whose losses may lie above the picture."""

Points = list[tuple[int, float]]
Label = tuple[float, str, str]
"""Loss (its height in the picture), text and colour."""


@dataclass
class Curve:
    """What is drawn of one run.

    Attributes:
        train: (step, training loss) of every step.
        smooth: the training loss averaged over its neighbours.
        validation: (step, validation loss), without step 0: an untrained model's loss says nothing,
            and a line from there to the next validation would cross the picture.
        parts: the same for each data set of a mixture, by its name.
    """

    name: str
    train: Points
    smooth: list[float]
    validation: Points
    parts: dict[str, Points] = field(default_factory=dict)

    @property
    def best(self) -> tuple[int, float] | None:
        """The lowest validation loss and its step."""
        return min(self.validation, key=lambda point: point[1], default=None)

    @property
    def shown(self) -> list[float]:
        """The losses that must be inside the picture; the fall of the first steps may leave it."""
        begin = int(len(self.smooth) * UNSEEN)
        return self.smooth[begin:] + [loss for _, loss in self.validation]


def plot_runs(runs: list[Path], out: Path) -> None:
    """Draw training and validation loss over steps, the best validation loss marked.

    The picture of a single run also shows the validation loss of each data set of a mixture.

    Args:
        runs: run directories (with ``metrics.jsonl``).
        out: picture to write; the ending chooses png, pdf or svg.

    Raises:
        UsageError: a run has no metrics yet, or the file name has another ending.
    """
    if out.suffix not in FORMATS:
        raise UsageError(f"{out}: the picture's name must end in {', '.join(FORMATS)}")
    configs = [settings(run) for run in runs]
    names = names_of(runs, configs)
    curves = [read_curve(run, name) for run, name in zip(runs, names, strict=True)]
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    labels = _draw_one(axes, curves[0]) if len(curves) == 1 else _draw_several(axes, curves)
    _write_labels(axes, labels)
    axes.set_xlim(0, max(curve.train[-1][0] for curve in curves))
    axes.set_title(title(names, configs), loc="left", fontsize=11)
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
    validations: dict[str, Points] = {"val_loss": []}
    for row in rows:
        for key, loss in row.items():
            if key.startswith("val_loss") and loss is not None and row["step"] > 0:
                validations.setdefault(key, []).append((row["step"], loss))
    validation = validations.pop("val_loss")
    parts = {key.removeprefix("val_loss/"): points for key, points in validations.items()}
    return Curve(name, train, smoothed([loss for _, loss in train]), validation, parts)


def names_of(runs: list[Path], configs: list[dict[str, Any]]) -> list[str]:
    """A name of each run, with the value of the setting in which the runs differ if it is one."""
    names, differing = short_names(runs), differing_settings(configs)
    if len(differing) != 1:
        return names
    values = [config.get(differing[0]) for config in configs]
    shown = [", ".join(short_names(v)) if isinstance(v, dict) else v for v in values]
    return [f"{name} ({value})" for name, value in zip(names, shown, strict=True)]


def title(names: list[str], configs: list[dict[str, Any]]) -> str:
    """What the picture shows: one run, or the settings in which runs differ; and the data."""
    data = [list(config.get("data.path") or {}) for config in configs]
    alike = data[0] and all(paths == data[0] for paths in data)
    on = f" on {', '.join(short_names(data[0]))}" if alike else ""
    if len(names) == 1:
        return f"{names[0]}: training and validation loss{on}"
    differing = differing_settings(configs)
    by = f" by {', '.join(differing)}" if 0 < len(differing) <= 3 else f" of {len(names)} runs"
    return f"Loss{by}{on}"


def settings(run: Path) -> dict[str, Any]:
    """Dotted key → value of a run's ``config.yaml``; empty where there is none."""
    path = run / "config.yaml"
    return _flat(yaml.safe_load(path.read_text())) if path.exists() else {}


def differing_settings(configs: list[dict[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all configurations, except ``out_dir``."""
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
    """Each value on the straight line fitted to its neighbours, about 4 % of all values.

    The window is centred, so the curve does not lag. It is narrower at the start, where losses fall
    steeply. At the end it is the last full window; there a fitted line still follows a slope, which
    a mean would not.
    """
    import numpy as np

    count = len(values)
    half = min(200, count // 50)
    if half < 1:
        return list(values)
    y = np.asarray(values)
    x = np.arange(count) - count / 2
    place = np.arange(count)
    reach = np.clip(place // 4, 1, half)
    left = np.clip(place - reach, 0, count - 2 * half - 1)
    right = np.clip(place + reach + 1, 3, count)

    def mean(series: Any) -> Any:
        sums = np.concatenate([[0.0], np.cumsum(series)])
        return (sums[right] - sums[left]) / (right - left)

    mean_x, mean_y = mean(x), mean(y)
    slope = (mean(x * y) - mean_x * mean_y) / (mean(x * x) - mean_x**2)
    fitted: list[float] = (mean_y + slope * (x - mean_x)).tolist()
    return fitted


def _draw_one(axes: Any, curve: Curve) -> list[Label]:
    color = COLORS[0]
    _draw_training(axes, curve, color)
    labels = [(curve.smooth[-1], f"training\n{curve.smooth[-1]:.2f} at the end", color)]
    for number, (name, points) in enumerate(curve.parts.items(), start=1):
        part_color = COLORS[number % len(COLORS)]
        _draw_validation(axes, points, part_color, linewidth=0.9, markersize=2)
        loss = points[-1][1]
        labels.append((loss, f"{name}\n{loss:.4f} at the end", part_color))
    if curve.best:
        _draw_validation(axes, curve.validation, color)
        labels.append((curve.best[1], f"validation\n{_mark_best(axes, curve.best, color)}", color))
    axes.set_ylim(*_limits(curve.shown + [loss for p in curve.parts.values() for _, loss in p]))
    return labels


def _draw_several(axes: Any, curves: list[Curve]) -> list[Label]:
    labels = []
    for number, curve in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        _draw_training(axes, curve, color)
        if curve.best:
            _draw_validation(axes, curve.validation, color)
            text = _mark_best(axes, curve.best, color)
            labels.append((curve.best[1], f"{curve.name}\n{text}", color))
        else:
            end = curve.smooth[-1]
            labels.append((end, f"{curve.name}\n{end:.2f} at the end", color))
    axes.set_ylim(*_limits([loss for curve in curves for loss in curve.shown]))
    axes.plot([], [], color=GREY, linewidth=1.2, label="training")
    axes.plot([], [], color=GREY, linewidth=1.6, marker="o", markersize=3.5, label="validation")
    # Right of the axis label, where nothing else is.
    axes.legend(loc="upper right", bbox_to_anchor=(1, -0.06), ncols=2, fontsize=8.5, frameon=False)
    return labels


def _draw_training(axes: Any, curve: Curve, color: str) -> None:
    steps = [step for step, _ in curve.train]
    axes.plot(*zip(*curve.train, strict=True), color=color, alpha=0.18, linewidth=0.6)
    axes.plot(steps, curve.smooth, color=color, alpha=0.7, linewidth=1.2)


def _draw_validation(
    axes: Any, points: Points, color: str, linewidth: float = 1.6, markersize: float = 3.5
) -> None:
    # Few points far apart are no curve: a line between them would show what nobody measured.
    line = "-" if len(points) > 3 else ""
    axes.plot(
        *zip(*points, strict=True), color=color, linestyle=line, linewidth=linewidth,
        marker="o", markersize=markersize, clip_on=False, zorder=3,
    )  # fmt: skip


def _mark_best(axes: Any, best: tuple[int, float], color: str) -> str:
    """Draw a ring around the best validation; returns what its label says."""
    axes.plot(
        *best, color=color, marker="o", markersize=9, fillstyle="none", clip_on=False, zorder=3
    )
    return f"best {best[1]:.4f} at step {best[0]:,}"


def _limits(losses: list[float]) -> tuple[float, float]:
    """Lowest and highest loss of the picture."""
    margin = 0.05 * (max(losses) - min(losses)) or 0.1
    return min(losses) - margin, max(losses) + margin


def _write_labels(axes: Any, labels: list[Label]) -> None:
    """Write labels right of the picture, each at the height of its loss."""
    low, high = axes.get_ylim()
    labels = sorted(labels, reverse=True)
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
