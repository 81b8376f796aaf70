"""Where a run's numbers go: ``metrics.jsonl``, TensorBoard, ``samples.txt``.

Every destination is a ``Sink``; another tracker is one more class with these five methods. The
console is in ``console.py``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

from gpt_dist.config.settings import Config, to_yaml
from gpt_dist.files import write_atomically
from gpt_dist.training.reporting.metrics import Row, encode_row, whole_lines


class Sink(Protocol):
    """A destination of a run's numbers. Only world rank 0 has any."""

    def train(self, row: Row) -> None:
        """A training step: train_loss, lr, grad_norm, tokens, tokens_per_second, mfu, step_ms.

        Where an outlier may skip an update also loss_z, grad_norm_z, skipped.
        """

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
        numbers = ("train_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "step_ms")
        for key in (*numbers, "loss_z", "grad_norm_z"):
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
