"""Files that a resumed run cuts back to where it continues."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gpt_dist.training.reporting.sinks import JsonLines, Samples


def test_rows_after_the_checkpoint_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0, -1)
    for step in range(1, 5):
        sink.train({"step": step, "train_loss": 1 / step, "grad_norm": math.inf})
    for step in (0, 2, 4):
        sink.validation({"step": step, "val_loss": 3.0})
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 5, "train_lo')
    JsonLines(path, 3, 0).close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "val_loss" in row] == [0]
    assert rows[2] == {"step": 3, "train_loss": 1 / 3, "grad_norm": None}


TEXT = "once\n===== upon ===== a time\n\n"


@pytest.mark.parametrize("torn", ["", "=====", "===== step 1", "===== step 15 ====="])
def test_samples_after_the_checkpoint_go(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "samples.txt"
    path.write_text(torn)  # all that a kill left of the first sample
    sink = Samples(path, -1)
    for step in (0, 10, 20):
        sink.sample(step, TEXT)
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    Samples(path, 10)
    kept = path.read_text()
    assert kept == "".join(f"===== step {step} =====\n{TEXT}\n" for step in (0, 10))
