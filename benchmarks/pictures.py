"""The documentation's pictures, drawn from the records by ``benchmarks/report.py``.

Nothing is measured here: every number is read from benchmarks/results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_dist.training.reporting.curves import plot_runs, smoothed
from gpt_dist.training.reporting.metrics import whole_lines

NANOGPT = 1.4697
"""nanoGPT's best validation loss on tiny Shakespeare, as its README tells it."""

LADDER = {
    "bigram-shakespeare-char": "bigram",
    "one-head-8": "attention, 8 characters",
    "one-head-64": "64 characters",
    "four-heads": "four heads",
    "shakespeare-char-cpu": "four blocks",
    "longer": "twice the steps",
    "shakespeare-char": "larger",
}
"""The runs of docs/bigram-to-transformer.md in the page's order, and what each adds."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Theme:
    """Colours of one picture: ours, the peers', text and lines on a given page."""

    ink: str = "#1f2328"
    muted: str = "#656d76"
    grid: str = "#d1d9e0"
    ours: str = "#1f6feb"
    ours_light: str = "#79b0ff"
    peer: str = "#9aa4af"
    peer_light: str = "#c5ccd3"
    page: str = "#ffffff"


LIGHT = Theme()
DARK = Theme(
    ink="#e6edf3", muted="#9198a1", grid="#30363d", ours="#58a6ff", ours_light="#2f5f9e",
    peer="#7d8590", peer_light="#484f58", page="#0d1117",
)  # fmt: skip


def new_figure(width: float, height: float, theme: Theme) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=200, layout="constrained", facecolor=theme.page)


def style(axes: Any, theme: Theme, title: str, subtitle: str = "") -> None:
    """A heading at the left, thin lines, no frame."""
    axes.set_facecolor(theme.page)
    axes.set_title(title + "\n", loc="left", fontsize=11, fontweight="bold", color=theme.ink)
    axes.annotate(
        subtitle, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
        fontsize=8.5, color=theme.muted,
    )  # fmt: skip
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    axes.xaxis.label.set(color=theme.muted, fontsize=8.5)
    axes.yaxis.label.set(color=theme.muted, fontsize=8.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.set_axisbelow(True)


def bars(axes: Any, groups: list[dict[str, float]], theme: Theme) -> None:
    """Horizontal bars from the top down, each with its name and value; ours also with how many
    times the best peer of its group that is.

    Args:
        groups: name → value; a gap between groups.
    """
    most = max(value for group in groups for value in group.values())
    place = 0.0
    for group in groups:
        best_peer = max(value for name, value in group.items() if not name.startswith("gpt_dist"))
        for name, value in group.items():
            own = name.startswith("gpt_dist")
            weight = "bold" if own else "normal"
            axes.barh(place, value, color=theme.ours if own else theme.peer, height=0.38)
            axes.annotate(
                name, (0, place + 0.19), (0, 4), textcoords="offset points", fontsize=8.5,
                color=theme.ink, fontweight=weight,
            )  # fmt: skip
            axes.annotate(
                f"{value:,.0f}" + (f"  ({value / best_peer:.1f}×)" if own else ""),
                (value, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5,
                color=theme.ink, fontweight=weight,
            )  # fmt: skip
            place -= 1
        place -= 0.35
    axes.set(xticks=[], yticks=[], xlim=(0, most * 1.45), ylim=(place + 1, 0.75))
    axes.spines["bottom"].set_visible(False)


def curve(results: Path, run: str) -> tuple[list[int], list[float], float]:
    """Tokens seen, smoothed training loss and last validation loss of a run."""
    rows = whole_lines(results / "shakespeare" / run / "metrics.jsonl")
    train = [row for row in rows if row.get("train_loss") is not None]
    tokens = [row["tokens"] for row in train]
    last = [row["val_loss"] for row in rows if row.get("val_loss") is not None][-1]
    return tokens, smoothed([row["train_loss"] for row in train]), last


def validation(results: Path, run: str) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's validations after step 0."""
    rows = whole_lines(results / "shakespeare" / run / "metrics.jsonl")
    found = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") and row["step"]]
    return [step for step, _ in found], [loss for _, loss in found]


def read(results: Path, name: str) -> Record:
    found: Record = json.loads((results / name).read_text())
    return found


def first_screen(results: Path, theme: Theme, out: Path) -> None:
    """A curve beside nanoGPT's best; training and decoding speed beside the peers'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.1), dpi=200, facecolor=theme.page)
    losses, training_axes, decoding_axes = (
        figure.add_axes((left, 0.09, width, 0.74))
        for left, width in ((0.035, 0.3), (0.4, 0.26), (0.7, 0.28))
    )
    steps, values = validation(results, "shakespeare-char")
    style(losses, theme, "Validation loss", "tiny Shakespeare by character, 10.7M parameters")
    losses.plot(steps, values, color=theme.ours, linewidth=2.2)
    losses.plot(steps[-1], values[-1], "o", color=theme.ours, markersize=6, clip_on=False)
    losses.axhline(NANOGPT, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
    for text, y, vertical, color, weight in (
        (f"nanoGPT's best\n{NANOGPT:.3f}", NANOGPT + 0.016, "bottom", theme.muted, "normal"),
        (f"gpt_dist {values[-1]:.3f}", values[-1] - 0.03, "top", theme.ours, "bold"),
    ):
        losses.text(
            steps[-1], y, text, ha="right", va=vertical, color=color, fontsize=9.5,
            fontweight=weight,
        )  # fmt: skip
    losses.set(xlim=(0, steps[-1]), ylim=(1.36, 2.0), yticks=[1.4, 1.6, 1.8])
    losses.set_xticks([0, 400, 800, 1200, 1600], ["0", "400", "800", "1,200", "step 1,600"])
    losses.grid(axis="y", color=theme.grid, linewidth=0.6)

    found = read(results, "training.json")["results"][0]["trainers"]
    style(training_axes, theme, "Training, tokens/s", "GPT-2 124M, bf16, two CPU cores")
    bars(training_axes, [{name: v["tokens_per_second"] for name, v in found.items()}], theme)

    speeds = read(results, "serving-avx512.json")["tokens_per_second"]
    style(decoding_axes, theme, "Decoding, tokens/s", "GPT-2 124M, batch 32, two CPU cores")
    medians = {name: batches["32"]["median"] for name, batches in speeds.items()}
    fastest_first = sorted(medians.items(), key=lambda item: -item[1])
    groups = [
        {name: speed for name, speed in fastest_first if name.endswith(dtype)}
        for dtype in ("int8", "bf16")
    ]
    bars(decoding_axes, groups, theme)
    training_axes.set_ylim(decoding_axes.get_ylim())
    figure.savefig(out)


def ladder(results: Path, out: Path, theme: Theme = LIGHT) -> None:
    """All runs of docs/bigram-to-transformer.md: their curves, and what each step buys."""
    runs = [run for run in LADDER if (results / "shakespeare" / run / "metrics.jsonl").exists()]
    figure = new_figure(10, 4.4, theme)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.1]})
    style(left, theme, "Training loss", "tiny Shakespeare, nats per character")
    style(right, theme, "Validation loss at the end", "each step starts where the one above ended")
    before: float | None = None
    for place, run in enumerate(runs):
        color = _mix(theme.peer, theme.ours, place / (len(runs) - 1))
        tokens, losses, last = curve(results, run)
        left.plot(tokens, losses, color=color, linewidth=1.5)
        if before is not None:
            right.plot([before, last], [-place, -place], color=color, linewidth=5, alpha=0.45)
        right.plot(last, -place, "o", color=color, markersize=8)
        right.annotate(
            f"{last:.2f}", (last, -place), (-9, 0), textcoords="offset points", ha="right",
            va="center", fontsize=10, fontweight="bold", color=color,
        )  # fmt: skip
        right.annotate(
            LADDER[run], (before or last, -place), (9, 0), textcoords="offset points",
            va="center", fontsize=10, color=theme.ink,
        )  # fmt: skip
        before = last
    left.set(xscale="log", xlim=(2e4, 3e7), ylim=(1.1, 3.0), xlabel="characters seen")
    left.set_xticks([1e5, 1e6, 1e7], ["100 thousand", "1 million", "10 million"])
    left.minorticks_off()
    left.grid(axis="y", color=theme.grid, linewidth=0.6)
    right.set(xlim=(1.3, 2.95), ylim=(0.5 - len(runs), 0.5), yticks=[])
    right.grid(axis="x", color=theme.grid, linewidth=0.6)
    figure.savefig(out)


def _mix(first: str, second: str, share: float) -> str:
    from matplotlib.colors import to_hex, to_rgb

    pairs = zip(to_rgb(first), to_rgb(second), strict=True)
    return str(to_hex([a + (b - a) * share for a, b in pairs]))


def training(found: Record, out: Path, theme: Theme = LIGHT) -> None:
    """Tokens per second of each trainer, one panel for each setting of a comparison."""
    results = found["results"]
    figure = new_figure(8.5, 0.5 + 0.5 * len(results[0]["trainers"]), theme)
    for axes, result in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results, strict=True
    ):
        speeds = {name: v["tokens_per_second"] for name, v in result["trainers"].items()}
        micro_batches = (
            "1 micro-batch"
            if result["accumulate"] == 1
            else (f"{result['accumulate']} micro-batches")
        )
        style(
            axes, theme, f"{micro_batches} a step",
            f"of {result['micro_batch']} × {found['context']} tokens; tokens/s",
        )  # fmt: skip
        bars(axes, [speeds], theme)
    figure.savefig(out)


def learning(found: Record, out: Path, theme: Theme = LIGHT) -> None:
    """The sweeps of learning rates, and the validation loss of all seeds, by recipe."""
    figure = new_figure(8.5, 3.2 + 0.2 * len(found["recipes"]), theme)
    left, right = figure.subplots(1, 2)
    style(left, theme, "Loss at the end", "by learning rate, one seed")
    style(right, theme, "Validation loss", "at each recipe's best rate, all seeds")
    recipes = found["recipes"]
    # The first is what the others are held against; the last is the one to look at.
    shades = [theme.peer, *[theme.ours_light] * (len(recipes) - 2), theme.ours]
    for (name, values), color in zip(recipes.items(), shades, strict=True):
        rates = [float(rate) for rate in values["sweep"]]
        losses = list(values["sweep"].values())
        best = losses.index(min(losses))
        label = f"{name}: {values['mean']:.2f} after {values['steps']} steps, lr {rates[best]:g}"
        left.plot(rates, losses, "o-", color=color, linewidth=1.8, markersize=4, label=label)
        left.plot(rates[best], losses[best], "o", color=color, markersize=9, fillstyle="none")
        for points in values["curves"]:
            steps, losses = zip(*points[1:], strict=True)
            right.plot(steps, losses, color=color, linewidth=1.2)
    left.set(xscale="log", xlabel="learning rate")
    ticks = sorted({float(rate) for values in recipes.values() for rate in values["sweep"]})
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    right.set(xlabel="step", xlim=(0, None))
    for axes in (left, right):
        axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    figure.legend(loc="outside lower left", labelcolor=theme.ink, frameon=False, fontsize=9)
    figure.savefig(out)


def picture_of(kind: str, found: Record) -> Callable[[Record, Path], None] | None:
    """The function that draws a record of this kind; None where there is no picture."""
    if kind == "training" or (kind == "gpu" and "results" in found):
        return training
    return learning if kind == "learning" else None


def draw_all(records: dict[Path, Record], results: Path, images: Path) -> list[Path]:
    """Draw every record that has a picture, and those of README and pages; the files written."""
    drawn = []
    for path, found in records.items():
        draw = picture_of(path.stem.split("-")[0], found)
        if draw:
            drawn.append(images / f"{path.stem}.png")
            draw(found, drawn[-1])
    if (results / "shakespeare/shakespeare-char/metrics.jsonl").exists():
        for name, theme in (("light", LIGHT), ("dark", DARK)):
            drawn.append(images / f"first-screen-{name}.png")
            first_screen(results, theme, drawn[-1])
        drawn.append(images / "bigram-to-transformer.png")
        ladder(results, drawn[-1])
        drawn.append(images / "loss.png")
        plot_runs([results / "shakespeare/shakespeare-char"], drawn[-1])
    return drawn
