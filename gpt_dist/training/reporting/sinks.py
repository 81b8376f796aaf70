"""Where a run's numbers go: console, ``metrics.jsonl``, TensorBoard, ``samples.txt``.

Every destination is a ``Sink``; another tracker is one more class with these five methods.
"""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gpt_dist.config.settings import Config, to_yaml
from gpt_dist.files import write_atomically
from gpt_dist.training.reporting.formatting import clock, human
from gpt_dist.training.reporting.metrics import Row, encode_row, whole_lines


class Sink(Protocol):
    """A destination of a run's numbers. Only world rank 0 has any."""

    def train(self, row: Row) -> None:
        """A training step: train_loss, lr, grad_norm, tokens, tokens_per_second, mfu, step_ms."""

    def validation(self, row: Row) -> None:
        """A validation: step, val_loss, val_bpb and further scores."""

    def sample(self, step: int, text: str) -> None:
        """Text that the model wrote after ``step`` updates."""

    def flush(self) -> None:
        """Write everything through to the disk; called before a checkpoint is taken."""

    def close(self) -> None:
        """Flush and close; called when the run ends."""


class JsonLines:
    """``metrics.jsonl``: one JSON object a row, numbers in full precision, null where not finite.

    Args:
        path: the file.
        step: rows of later training steps are removed, because a resumed run writes them again.
        evaluated: scores of later steps are removed likewise.
    """

    def __init__(self, path: Path, step: int, evaluated: int) -> None:
        kept = [
            line
            for line in whole_lines(path)
            if line["step"] <= (step if "train_loss" in line else evaluated)
        ]
        if path.exists():
            write_atomically(path, b"".join(map(encode_row, kept)))
        self._file = path.open("ab")

    def train(self, row: Row) -> None:
        self._file.write(encode_row(row))
        self._file.flush()

    validation = train

    def sample(self, step: int, text: str) -> None:
        pass

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


class TensorBoard:
    """Scalars, samples and the configuration as TensorBoard events."""

    def __init__(self, directory: Path, step: int, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # TensorBoard itself hides the events after the step that a run resumes from.
        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)
        if not step:
            self._writer.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)

    def train(self, row: Row) -> None:
        for key in ("train_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "step_ms"):
            if row.get(key) is not None:
                self._writer.add_scalar(f"train/{key}", row[key], row["step"])

    def validation(self, row: Row) -> None:
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(f"validation/{key}", value, row["step"])

    def sample(self, step: int, text: str) -> None:
        self._writer.add_text("sample", f"```text\n{text}\n```", step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Samples:
    """``samples.txt``: each sample under a line that names the step."""

    HEAD = "===== step {} =====\n"

    def __init__(self, path: Path, sampled: int) -> None:
        self._path = path
        if path.exists():
            text = path.read_text("utf-8", errors="replace")
            # Step and text of each sample; a head that a kill left incomplete belongs to neither.
            _, *parts = re.split(r"^===== step (\d+) =====$\n?", text, flags=re.M)
            samples = zip(map(int, parts[::2]), parts[1::2], strict=True)
            kept = [self.HEAD.format(step) + text for step, text in samples if step <= sampled]
            write_atomically(path, "".join(kept).encode())

    def sample(self, step: int, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self.HEAD.format(step) + text + "\n")

    def train(self, row: Row) -> None:
        pass

    validation = train

    def flush(self) -> None:
        pass

    close = flush


class ConsoleSink:
    """A progress bar on a terminal; elsewhere plain lines, fewer as time goes on."""

    def __init__(self, step: int, steps: int) -> None:
        self._steps, self._console = steps, Console(highlight=False, soft_wrap=True)
        self._last_line = -math.inf
        self._progress: Progress | None = None
        self._first = step
        self._started, self._seconds = time.monotonic(), 0.0
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=steps, completed=step, numbers="")
            self._progress.start()

    def train(self, row: Row) -> None:
        numbers = format_numbers(row)
        if self._progress:
            self._progress.update(self._task, completed=row["step"], numbers=numbers)
        now = time.monotonic()
        self._seconds += row["step_ms"] / 1e3
        edge = row["step"] in (self._first + 1, self._steps) or "skipped" in numbers
        # Frequent at first, while someone watches; later rare, so that logs stay short.
        interval = min(10.0, 1 + (now - self._started) / 30)
        if edge or (not self._progress and now - self._last_line >= interval):
            self._last_line = now
            width = len(str(self._steps))
            left = self._seconds / (row["step"] - self._first) * (self._steps - row["step"])
            self.message(
                f"step {row['step']:>{width}}/{self._steps}  {numbers}  left {clock(left)}"
            )

    def validation(self, row: Row) -> None:
        scores = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if key != "step")
        self.message(f"step {row['step']}  {scores}", style="bold")

    def sample(self, step: int, text: str) -> None:
        self.message(f"--- sample after step {step}\n{text}\n---", style="dim")

    def message(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


def format_numbers(row: Row) -> str:
    """``loss 3.2871  lr 6.00e-04  norm 0.31  1.2M tok/s  mfu 41.3%``"""
    norm = row["grad_norm"]
    parts = [
        f"loss {row['train_loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"norm {norm:.2f}" if math.isfinite(norm) else f"norm {norm} (update skipped)",
        f"{human(row['tokens_per_second'])} tok/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"mfu {row['mfu']:.1%}")
    return "  ".join(parts)
