"""A run on the console: lines that stay, and on a terminal a bar with the numbers of the last step.

On a terminal no line is wider than the window: the least important numbers are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gpt_dist.training.reporting.formatting import clock, human
from gpt_dist.training.reporting.metrics import Row

IMPORTANCE = ("step", "left", "loss", "norm", "speed", "bar", "mfu", "lr")
"""Parts of a line, the most important first."""

GAP = "  "
SHORTEST_BAR, LONGEST_BAR = 10, 30

HALF_LIFE = 5.0
"""Seconds in which the weight of a step in the tokens per second shown falls by half."""

MEMORY = 0.8
"""Minimum weight that earlier steps keep, so that long steps are averaged too."""


def new_console(**options: Any) -> Console:
    """A console that prints text as it is: no colours for numbers, no ``:cat:``, no line breaks."""
    return Console(highlight=False, emoji=False, soft_wrap=True, **options)


class ConsoleSink:
    """Prints lines, fewer as time goes on, and keeps a bar below them if there is a terminal.

    Args:
        step: the last step that is done.
        steps: the run's last step.
        console: where to print.
        timer: seconds since any fixed moment.
    """

    def __init__(
        self,
        step: int,
        steps: int,
        console: Console | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first, self._step, self._steps = step, step, steps
        self._console = console or new_console()
        self._timer, self._started = timer, timer()
        self._began: float | None = None
        """When the first step began."""
        self._last_line = -math.inf
        self._tokens = self._seconds = 0.0
        self._parts: dict[str, str] = {}
        self._live: Live | None = None
        if self._console.is_interactive:
            self._live = Live(console=self._console, get_renderable=self._bar, transient=True)
            self._live.start()
            # Visible, because a run that is killed could not bring it back.
            self._console.show_cursor(True)

    @property
    def _width(self) -> float:
        return self._console.width if self._console.is_interactive else math.inf

    def train(self, row: Row) -> None:
        now = self._timer()
        if self._began is None:
            self._began = now - row["step_ms"] / 1e3
        self._step = row["step"]
        pace = (now - self._began) / (self._step - self._first)
        numbers = format_numbers(row, self._smooth(row))
        self._parts = numbers | {"left": f"left {clock(pace * (self._steps - self._step))}"}
        edge = self._step in (self._first + 1, self._steps)
        # Frequent at first, while someone watches; later rare, so that logs stay short.
        interval = min(10.0, 1 + (now - self._started) / 30)
        if edge or is_skipped(row) or now - self._last_line >= interval:
            self._last_line = now
            parts = {"step": f"step {self._step:>{len(str(self._steps))}}/{self._steps}"}
            self._print(GAP.join(fitting(parts | self._parts, self._width).values()))

    def _smooth(self, row: Row) -> float:
        """Tokens per second of the last few steps."""
        seconds = row["step_ms"] / 1e3
        keep = max(MEMORY, 0.5 ** (seconds / HALF_LIFE))
        self._tokens = keep * self._tokens + row["tokens_per_second"] * seconds
        self._seconds = keep * self._seconds + seconds
        return self._tokens / self._seconds

    def _bar(self) -> Text:
        """The line below all others: how far the run is, and its numbers."""
        parts = {"step": f"step {self._step}/{self._steps}", "bar": " " * SHORTEST_BAR}
        parts = fitting(parts | self._parts, self._width)
        room = int(self._width) - len(GAP.join(parts.values()))
        length = min(LONGEST_BAR, SHORTEST_BAR + room)
        done = length * self._step // self._steps
        tick = "-" if self._console.options.ascii_only else "━"
        line = Text(no_wrap=True, overflow="crop")
        for name, text in parts.items():
            line.append(GAP if line else "")
            if name == "bar":
                line.append(tick * done, "green").append(tick * (length - done), "bright_black")
            else:
                line.append(text)
        return line

    def validation(self, row: Row) -> None:
        head = f"step {row['step']}"
        scores = [f"{key} {value:.4f}" for key, value in row.items() if key != "step"]
        lines = [head]
        for score in scores:
            if len(lines[-1] + GAP + score) > self._width:
                lines.append(" " * len(head))
            lines[-1] += GAP + score
        self._print("\n".join(lines), style="bold")

    def sample(self, step: int, text: str) -> None:
        shown = f"--- sample after step {step}\n{text}\n---"
        self._print(shown, style="dim", soft_wrap=not self._live)

    def _print(self, text: str, style: str | None = None, soft_wrap: bool = True) -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=soft_wrap)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self._live:
            self._live.stop()


def is_skipped(row: Row) -> bool:
    """Whether the update of a step was skipped."""
    return bool(row.get("skipped")) or not math.isfinite(row["grad_norm"])


def format_numbers(row: Row, speed: float) -> dict[str, str]:
    """The numbers of a step as people read them, by name.

    Joined: ``loss 3.2871  lr 6.00e-04  norm 0.31  1.2M tok/s  mfu 41.3%``.

    Args:
        row: of ``metrics.jsonl``.
        speed: the tokens per second to show.
    """
    norm = row["grad_norm"]
    parts = {
        "loss": f"loss {row['train_loss']:.4f}",
        "lr": f"lr {row['lr']:.2e}",
        "norm": f"norm {norm:.2f}" + " (update skipped)" * is_skipped(row),
        "speed": f"{human(speed)} tok/s",
    }
    if row["mfu"] is not None:
        parts["mfu"] = f"mfu {row['mfu'] * speed / row['tokens_per_second']:.1%}"
    return parts


def fitting(parts: Mapping[str, str], width: float) -> dict[str, str]:
    """The parts of a line that fit into ``width`` columns together, in their order."""
    kept: dict[str, str] = {}
    for name in IMPORTANCE:
        more = kept | {name: parts.get(name, "")}
        if name in parts and len(GAP.join(more.values())) <= width:
            kept = more
    return {name: text for name, text in parts.items() if name in kept}
