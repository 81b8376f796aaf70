"""The picture of a run: what is drawn, where, and what it says."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpt_dist.training.reporting.curves import (
    differing_settings,
    names_of,
    plot_runs,
    read_curve,
    settings,
    smoothed,
    spread,
    title,
)


def write_run(
    directory: Path,
    *,
    validation: dict[int, float],
    config: str = "",
    parts: dict[str, float] | None = None,
) -> Path:
    """Write what a picture needs of a run; ``parts`` is added to the loss for each data set."""
    directory.mkdir()
    rows: list[dict[str, float]] = [
        {"step": step, "train_loss": 1 + 3 * math.exp(-step / 40)} for step in range(1, 401)
    ]
    for step, loss in validation.items():
        of_each = {f"val_loss/{name}": loss + more for name, more in (parts or {}).items()}
        rows.append({"step": step, "val_loss": loss} | of_each)
    text = "\n".join(map(json.dumps, rows))
    (directory / "metrics.jsonl").write_text(text)
    (directory / "config.yaml").write_text(config or f"out_dir: {directory}")
    return directory


def texts(picture: Path) -> str:
    """All comments of an SVG: matplotlib writes each label as one beside its outlines."""
    builder = ElementTree.TreeBuilder(insert_comments=True)
    parser = ElementTree.XMLParser(target=builder)
    tree = ElementTree.parse(picture, parser)
    return "\n".join(e.text or "" for e in tree.iter() if e.tag is ElementTree.Comment)


def test_smoothing_does_not_lag() -> None:
    """A slope stays where it is, ends included; a mean of the past would be late."""
    slope = [5 - 0.01 * step for step in range(1000)]
    assert smoothed(slope) == pytest.approx(slope, abs=1e-9)
    step = [2.0] * 500 + [1.0] * 500
    assert smoothed(step)[500 - 20 : 500 + 20][19:21] == pytest.approx([1.5, 1.5], abs=0.1)


def test_smoothing_removes_noise() -> None:
    generator = random.Random(3)
    smooth = smoothed([3 + generator.gauss(0, 0.1) for _ in range(2000)])
    assert max(abs(value - 3) for value in smooth[40:-40]) < 0.05
    assert max(abs(value - 3) for value in smooth[-40:]) < 0.05  # the end is calm too


def test_smoothing_keeps_a_steep_start() -> None:
    steep = [1 + 3 * math.exp(-step / 10) for step in range(2000)]
    assert smoothed(steep)[:3] == pytest.approx(steep[:3], abs=0.05)


def test_a_short_run_is_drawn_as_it_is() -> None:
    assert smoothed([4.0, 1.0, 3.0]) == [4.0, 1.0, 3.0]


def test_validation_begins_at_the_first_trained_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", validation={0: 4.2, 200: 1.3, 400: 1.1})
    curve = read_curve(run, "run")
    assert curve.validation == [(200, 1.3), (400, 1.1)]
    assert curve.best == (400, 1.1)
    assert max(curve.shown) < 3.5  # the fall of the first steps leaves the picture


@pytest.mark.slow(2)
def test_labels_name_the_runs_and_their_best(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", validation={200: 1.25, 300: 1.15, 400: 1.35})
    two = write_run(tmp_path / "two", validation={})
    out = tmp_path / "both.svg"
    plot_runs([one, two], out)
    found = texts(out)
    assert "Loss of 2 runs" in found
    assert "best 1.1500 at step 300" in found
    assert "two" in found
    plot_runs([one], out)
    assert "one: training and validation loss" in texts(out)


@pytest.mark.slow(2)
def test_each_data_set_of_a_mixture_is_drawn(tmp_path: Path) -> None:
    losses = {0: 4.2, 100: 1.5, 200: 1.25, 300: 1.15, 400: 1.2}
    run = write_run(tmp_path / "run", validation=losses, parts={"books": -0.5, "web": 1.5})
    curve = read_curve(run, "run")
    assert curve.parts["web"] == [(step, loss + 1.5) for step, loss in losses.items() if step]
    out = tmp_path / "one.svg"
    plot_runs([run], out)
    found = texts(out)
    assert "books" in found
    assert "0.7000 at the end" in found
    assert "2.7000 at the end" in found
    plot_runs([run, write_run(tmp_path / "other", validation=losses)], out)
    assert "books" not in texts(out)  # several runs: the mean alone


@pytest.mark.slow(2)
def test_the_title_says_what_differs(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / name,
            validation={},
            config=f"out_dir: {name}\noptim: {{lr: {lr}}}\ndata: {{path: {{a: 1.0}}}}",
        )
        for name, lr in (("slow", 1e-4), ("fast", 1e-3))
    ]
    assert differing_settings([settings(run) for run in runs]) == ["optim.lr"]
    out = tmp_path / "sweep.svg"
    plot_runs(runs, out)
    found = texts(out)
    assert "Loss by optim.lr on a" in found
    assert "slow (0.0001)" in found
    assert "fast (0.001)" in found


def test_runs_on_different_data_are_named_by_it(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, validation={}, config=f"data: {{path: {{data/{data}: 1.0}}}}")
        for name, data in (("one", "books"), ("two", "web"))
    ]
    configs = [settings(run) for run in runs]
    assert names_of(runs, configs) == ["one (books)", "two (web)"]
    assert title(["one", "two"], configs) == "Loss by data.path"


def test_labels_keep_their_distance() -> None:
    places = spread([0.9, 0.52, 0.5, 0.01, 0.0], 0.1)
    gaps = [above - below for above, below in itertools.pairwise(places)]
    assert min(gaps) == pytest.approx(0.1)
    assert places[0] == 0.9
    assert min(places) >= 0.0
