"""Training runs as users start them, each in a process of its own, compared with each other."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpt_dist.checkpoints.checkpoint import complete_checkpoints
from gpt_dist.checkpoints.reader import load_model
from tests.conftest import (
    column,
    make_dataset,
    read_rows,
    run_train,
    start_train,
    step_count,
    wait_until,
    words,
)

pytestmark = pytest.mark.slow
Config = Callable[..., Path]


def worst_relative(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


@pytest.mark.slow(40)
@pytest.mark.parametrize(
    ("architecture", "others"),
    [
        ("gpt2", [("four", 4, "8", 1e-5), ("micro", 1, "2", 5e-5)]),
        ("nanochat", [("two", 2, "8", 1e-5), ("micro-two", 2, "16", 5e-5)]),
    ],
)
def test_losses_do_not_depend_on_ranks_or_micro_batch(
    tiny_config: Config,
    tmp_path: Path,
    architecture: str,
    others: list[tuple[str, int, str, float]],
) -> None:
    config = tiny_config(model={"architecture": architecture})
    run_train(config, tmp_path / "one")
    for name, ranks, micro_batch, tolerance in others:
        run_train(config, tmp_path / name, "--train.micro_batch_size", micro_batch, ranks=ranks)
        for key in ("train_loss", "val_loss", "val_bpb", "grad_norm"):
            one, other = column(tmp_path / "one", key), column(tmp_path / name, key)
            assert worst_relative(one, other) < tolerance, (name, key)
    assert len(column(tmp_path / "one", "train_loss")) == 20
    losses = column(tmp_path / "one", "val_loss")
    assert losses[-1] < losses[0] - 0.5  # it learns


def test_rows_and_files_of_a_run(tiny_config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run_train(tiny_config(train={"sample_every": 10}), out)
    rows = read_rows(out)
    assert [row["step"] for row in rows if "train_loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 10, 20]
    train = next(row for row in rows if row["step"] == 7)
    assert set(train) == {
        "step", "train_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "step_ms",
    }  # fmt: skip
    assert train["tokens"] == 7 * 1024
    assert train["lr"] == pytest.approx(3e-3 * 7 / 20)
    for name in ("config.yaml", "loss.png", "samples.txt", "tensorboard", "checkpoints/best"):
        assert (out / name).exists(), name
    assert (out / "samples.txt").read_text().count("===== step ") == 3
    assert "step 20/20" in done.stdout.replace("  ", " ")
    assert "done" in done.stdout

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/train_loss")]
    expected = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    assert [step for step, _ in scalars] == [step for step, _ in expected]
    assert [value for _, value in scalars] == pytest.approx([value for _, value in expected])
    assert len(events.Scalars("validation/val_loss")) == 3
    assert any("sample" in tag for tag in events.Tags()["tensors"])
    assert any("config" in tag for tag in events.Tags()["tensors"])

    # The same command again has nothing to do and changes nothing.
    before = (out / "metrics.jsonl").read_bytes()
    assert "complete" in run_train(tiny_config(train={"sample_every": 10}), out).stdout
    assert (out / "metrics.jsonl").read_bytes() == before


def test_whole_validation_split_in_float64(tiny_config: Config, tmp_path: Path) -> None:
    """``val_loss`` over the whole split is the mean over every token but the first."""
    out = tmp_path / "run"
    run_train(tiny_config(train={"eval_tokens": None, "steps": 20}), out)
    (data,) = load_model(out)[2]["config"]["data"]["path"]
    loss, bits_per_byte = loss_in_float64(out, Path(data), 20)
    row = read_rows(out)[-1]
    assert row == {
        "step": 20,
        "val_loss": pytest.approx(loss, rel=1e-6),
        "val_bpb": pytest.approx(bits_per_byte, rel=1e-6),
    }


def loss_in_float64(run: Path, data: Path, step: int) -> tuple[float, float]:
    """Nats per token and bits per byte of a run's model on the validation split of ``data``."""
    model, tokenizer, state = load_model(run)
    assert state["step"] == step
    tokens = np.fromfile(data / "x_val_000000.bin", dtype=np.uint16)[512:].astype(np.int64)
    model, total, length = model.double(), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            ids = torch.from_numpy(tokens[start : start + 33])[None]
            logits = model(ids[:, :-1])[0]
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            length += len(tokenizer.decode(ids[0, 1:].tolist()).encode())
    return total / (len(tokens) - 1), total / np.log(2) / length


def test_validation_loss_of_each_data_set(
    tiny_config: Config, tiny_data: Path, tmp_path: Path
) -> None:
    small = make_dataset(tmp_path / "small", words(2000, 2), words(40, 3))
    out = tmp_path / "run"
    data = {"path": {str(tiny_data): 1.0, str(small): 3.0}}
    config = tiny_config(data=data, optim={"schedule": "constant"}, train={"eval_tokens": None})
    first = run_train(config, out)
    losses = [loss_in_float64(out, path, 20)[0] for path in (tiny_data, small)]
    row = read_rows(out)[-1]
    assert list(row) == ["step", "val_loss", "val_bpb", "val_loss/tiny", "val_loss/small"]
    assert row["val_loss/tiny"] == pytest.approx(losses[0], rel=1e-6)
    assert row["val_loss/small"] == pytest.approx(losses[1], rel=1e-6)
    assert row["val_loss"] == pytest.approx(0.25 * losses[0] + 0.75 * losses[1], rel=1e-6)
    assert f"val_loss/small {row['val_loss/small']:.4f}" in first.stdout

    rows = read_rows(out)
    run_train(config, out, "--train.steps", "30")
    assert read_rows(out)[: len(rows)] == rows
    assert len(column(out, "val_loss/small")) == 4

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    scalars = [event.value for event in events.Scalars("validation/val_loss/small")]
    assert scalars == pytest.approx(column(out, "val_loss/small"))


@pytest.mark.slow(20)
@pytest.mark.parametrize(
    ("number", "architecture"), [(signal.SIGTERM, "gpt2"), (signal.SIGUSR1, "nanochat")]
)
def test_a_stop_signal_checkpoints_and_the_same_command_continues(
    tiny_config: Config, tmp_path: Path, number: signal.Signals, architecture: str
) -> None:
    config = tiny_config(  # ends only by being stopped, however fast the machine is
        model={"dropout": 0.1, "architecture": architecture},
        optim={"schedule": "constant"},
        train={"steps": 1_000_000, "checkpoint_every": 0},
    )
    out = tmp_path / "stopped"
    run = start_train(config, out)
    wait_until(lambda: step_count(out) >= 20, "step 20", agent=run)
    run.commands[0].send_signal(number)
    done = run.completed()
    assert done.returncode == 0, done.stderr
    assert "run the same command to resume" in done.stdout
    steps = step_count(out)
    assert complete_checkpoints(out / "checkpoints")[-1].name == f"step-{steps:08d}"
    for each in (out, tmp_path / "quiet"):
        run_train(config, each, "--train.steps", str(steps + 10))
    assert_same_run(tmp_path / "quiet", out)


def assert_same_run(quiet: Path, other: Path) -> None:
    """The same rows except for timing, each once; bitwise equal weights and optimizer state."""
    assert read_rows(quiet, timing=False) == read_rows(other, timing=False)
    a, b = (complete_checkpoints(run / "checkpoints")[-1] for run in (quiet, other))
    assert a.name == b.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_from_an_older_checkpoint_drops_what_came_after(
    tiny_config: Config, tmp_path: Path, optimizer: str
) -> None:
    config = tiny_config(model={"dropout": 0.2}, optim={"name": optimizer})
    out = tmp_path / "run"
    run_train(config, out, "--train.keep_checkpoints", "5")
    before = read_rows(out, timing=False)
    weights = (out / "checkpoints/step-00000020/model.safetensors").read_bytes()
    import shutil

    shutil.rmtree(out / "checkpoints/step-00000020")  # as if the run had been killed before it
    (out / "checkpoints/best").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "train_lo')  # an incomplete line
    run_train(config, out)
    assert read_rows(out, timing=False) == before
    assert (out / "checkpoints/step-00000020/model.safetensors").read_bytes() == weights


def test_retention_keeps_the_newest_and_the_best(tiny_config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # A learning rate that ruins the model after a good start, so that the best comes early.
    config = tiny_config(
        optim={"lr": 0.05, "min_lr": 0.05, "schedule": "constant", "warmup_steps": 40},
        train={"steps": 120, "eval_every": 10, "checkpoint_every": 10, "keep_checkpoints": 2},
    )
    run_train(config, out)
    losses = {row["step"]: row["val_loss"] for row in read_rows(out) if "val_loss" in row}
    best = min((loss, step) for step, loss in losses.items() if step)[1]
    names = [path.name for path in complete_checkpoints(out / "checkpoints")]
    assert (out / "checkpoints/best").resolve().name == f"step-{best:08d}"
    assert names == sorted({f"step-{best:08d}", "step-00000110", "step-00000120"})
    state = json.loads((out / "checkpoints/best/state.json").read_text())
    assert state["best_loss"] == losses[best]


def test_init_from_starts_with_those_weights(tiny_config: Config, tmp_path: Path) -> None:
    run_train(tiny_config(), tmp_path / "first")
    out = tmp_path / "second"
    run_train(tiny_config(optim={"lr": 1e-5, "min_lr": 0.0}, seed=9), out,
              "--train.init_from", str(tmp_path / "first"))  # fmt: skip
    assert column(out, "val_loss")[0] == column(tmp_path / "first", "val_loss")[-1]
    assert column(out, "train_loss")[0] < column(tmp_path / "first", "train_loss")[0] - 0.5


def test_non_finite_gradients_skip_and_then_abort(tiny_config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run_train(tiny_config(optim={"lr": 1e18, "min_lr": 1e18, "schedule": "constant"}), out,
                     check=False)  # fmt: skip
    assert done.returncode == 1
    assert "not finite 10 times in a row" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    norms = column(out, "grad_norm")
    assert norms[-10:] == [None] * 10
    assert any(norm is not None for norm in norms)
