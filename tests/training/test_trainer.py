"""The trainer inside this process: no directory, no torchrun, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpt_dist.checkpoints.writer import CheckpointWriter
from gpt_dist.config.command_line import load
from gpt_dist.evaluation.validation import Validation
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.world import World
from gpt_dist.training import callbacks
from gpt_dist.training.callbacks import make_callbacks
from gpt_dist.training.reporting.metrics import Row
from gpt_dist.training.reporting.monitor import Monitor
from gpt_dist.training.setup import Run, setup
from gpt_dist.training.trainer import Trainer
from tests.conftest import make_dataset, words

Config = Callable[..., Path]
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


class Recorder:
    """A sink and a checkpoint writer that only record what they are given."""

    def __init__(self) -> None:
        self.steps: list[Row] = []
        self.rows: list[Row] = []
        self.samples: list[int] = []
        self.saved: list[tuple[dict[str, Any], bool]] = []

    def train(self, row: Row) -> None:
        self.steps.append(row)

    def validation(self, row: Row) -> None:
        self.rows.append(row)

    def sample(self, step: int, text: str) -> None:
        self.samples.append(step)

    def save(
        self, tensors: object, state: dict[str, Any], *_: object, best: bool, **__: Any
    ) -> None:
        self.saved.append((state, best))

    def busy(self, patience: float) -> bool:
        return False

    def flush(self) -> None:
        pass

    close = check = flush


@contextmanager
def stepping(config: Path, *flags: str) -> Iterator[Run]:
    """A run that was set up without a directory."""
    run = setup(load(["--config", str(config), *flags])[0], ALONE)
    try:
        yield run
    finally:
        run.close()


@pytest.fixture
def nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory in which the test must leave nothing."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    yield directory
    assert not list(directory.iterdir())


def test_it_is_built_and_stepped_without_a_directory(
    tiny_config: Config, nothing_written: Path
) -> None:
    class EveryThird:
        calls: list[int] = []  # noqa: RUF012

        def due(self, trainer: Trainer) -> bool:
            return trainer.on_schedule(3)

        def __call__(self, trainer: Trainer) -> None:
            self.calls.append(trainer.run.progress.step)

    recorder, callback = Recorder(), EveryThird()
    with stepping(tiny_config(train={"steps": 7}), "--optim.warmup_steps", "1") as run:
        torch.manual_seed(run.config.seed)
        model = GPT(run.config.model).double()
        tokens = torch.from_numpy(run.data.sequences(np.arange(32)).astype(np.int64))
        logits = model(tokens[:, :-1])
        expected = F.cross_entropy(
            logits.flatten(0, 1)[:, : model.vocab_size], tokens[:, 1:].flatten()
        )

        trainer = Trainer(run, [callback], Monitor([recorder]))
        trainer.step()
        assert [row["step"] for row in recorder.steps] == [1]
        assert recorder.steps[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-6)
        assert (run.progress.step, run.progress.sequences) == (1, 32)
        trainer.train()
    assert [row["step"] for row in recorder.steps] == list(range(1, 8))
    assert callback.calls == [3, 6, 7]
    assert recorder.steps[-1]["train_loss"] < recorder.steps[0]["train_loss"] - 0.1


def test_a_cpu_does_not_beat_its_peak(tiny_config: Config, nothing_written: Path) -> None:
    """A peak that was measured while other programs ran gives way to what a step reached."""
    recorder = Recorder()
    with stepping(tiny_config(train={"steps": 5}), "--optim.warmup_steps", "1") as run:
        Trainer(run, [], Monitor([recorder]), peak=1.0).train()
    shares = [row["mfu"] for row in recorder.steps]
    assert max(shares) == 1
    assert min(shares) > 1e-3


def trainer_of(run: Run, stop: Callable[[], bool] = lambda: False) -> tuple[Trainer, Recorder]:
    """A trainer with the usual callbacks, whose results are only recorded."""
    recorder = Recorder()
    writer: CheckpointWriter = recorder  # type: ignore[assignment]
    return Trainer(run, make_callbacks(run.config, writer), Monitor([recorder]), stop), recorder


CADENCES = ["--train.eval_every", "2", "--train.sample_every", "3", "--train.checkpoint_every", "4"]


def test_each_callback_keeps_its_cadence(tiny_config: Config, nothing_written: Path) -> None:
    with stepping(tiny_config(train={"steps": 9}, optim={"warmup_steps": 2}), *CADENCES) as run:
        trainer, recorder = trainer_of(run)
        trainer.train()
    assert [row["step"] for row in recorder.rows] == [0, 2, 4, 6, 8, 9]
    assert recorder.samples == [0, 3, 6, 9]
    # The loss falls at every validation, so each of them saves; 4, 8 and 9 are due anyway.
    assert [(state["step"], best) for state, best in recorder.saved] == [
        (2, True), (4, True), (6, True), (8, True), (9, True),
    ]  # fmt: skip
    losses = {row["step"]: row["val_loss"] for row in recorder.rows}
    for state, _ in recorder.saved:
        assert state["best_loss"] == losses[state["step"]]
        assert state["evaluated"] == state["step"]
        assert state["sampled"] == state["step"] // 3 * 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_health_is_that_of_autograds_gradients(tiny_config: Config, optimizer: str) -> None:
    kept: list[dict[str, dict[str, torch.Tensor]]] = []

    class Keep:
        """Copies weights and momentum at every step."""

        def due(self, trainer: Trainer) -> bool:
            return True

        def __call__(self, trainer: Trainer) -> None:
            parts: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in trainer.run.engine.full_state():
                section, _, parameter = name.removeprefix("optimizer.").partition(".")
                parts.setdefault(section, {})[parameter] = tensor.detach().double().clone()
            kept.append(parts)

    config = tiny_config(
        train={"steps": 6, "eval_every": 0, "health_every": 2},
        optim={"name": optimizer, "warmup_steps": 1, "grad_clip": 0.0, "momentum_warmup_steps": 9},
    )
    with stepping(config) as run:
        trainer, recorder = trainer_of(run)
        trainer.callbacks = [*trainer.callbacks, Keep()]
        trainer.train()
        assert [row["step"] for row in recorder.rows] == [1, 3, 5]
        row = recorder.rows[1]
        before, after = kept[2], kept[3]
        model = GPT(run.config.model).double()
        model.load_state_dict(before["model"])
        tokens = torch.from_numpy(run.data.sequences(np.arange(64, 96)).astype(np.int64))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    momenta = before["exp_avg"] | before.get("momentum_buffer", {})
    for kind, named in (("matrices", "h."), ("embedding", "w"), ("vectors", "")):
        names = [
            name for name, p in model.named_parameters()
            if (p.dim() > 1 and name.startswith(named)) != (kind == "vectors")
        ]  # fmt: skip
        old, new, momentum, gradient = (
            torch.cat([tensors[name].flatten() for name in names])
            for tensors in (
                before["model"], after["model"], momenta,
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            )
        )  # fmt: skip
        ratio = float((new - old).norm() / old.norm())
        assert row[f"update_ratio/{kind}"] == pytest.approx(ratio, rel=1e-6)
        cosine = float(F.cosine_similarity(gradient, momentum, dim=0))
        assert row[f"momentum_cosine/{kind}"] == pytest.approx(cosine, abs=1e-3)
        assert 1e-4 < ratio < 0.3
        assert abs(cosine) > 0.02


@pytest.mark.slow(5)
@pytest.mark.parametrize(
    ("settings", "losses", "saved", "best"),
    [
        # Every validation improves, and one in four steps may write: those at 4 and 8.
        ({"best_every": 4}, [9, 8, 7, 6, 5, 4], [4, 8, 10], [4, 8, 10]),
        # The loss rises after step 4: what was best stays best.
        ({"best_every": 1}, [9, 5, 4, 6, 7, 8], [2, 4, 10], [2, 4]),
        # Validations at odd multiples: the first at or after 3, 6 and 9.
        ({"best_every": 3}, [9, 8, 7, 6, 5, 4], [4, 6, 10], [4, 6, 10]),
        # Only regular checkpoints compete. The loss was lower at step 2, but nothing holds it.
        ({"best_every": 0, "checkpoint_every": 4}, [9, 1, 7, 6, 8, 9], [4, 8, 10], [4]),
        # A twentieth of ten steps: every validation.
        ({}, [9, 8, 7, 6, 7, 7], [2, 4, 6, 10], [2, 4, 6]),
        # Checkpoints to keep are written too.
        ({"best_every": 0, "keep_every": 3}, [9, 8, 7, 6, 5, 4], [3, 6, 9, 10], [6, 10]),
        ({"best_every": 1}, [9, float("nan"), 7, 8, 8, 8], [4, 10], [4]),
    ],
)
def test_which_validations_write_a_checkpoint(
    tiny_config: Config,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, int],
    losses: list[float],
    saved: list[int],
    best: list[int],
) -> None:
    results = iter(losses)
    monkeypatch.setattr(callbacks, "validate", lambda *_: Validation(next(results), 0.0, {}))
    train = {"steps": 10, "eval_every": 2, "checkpoint_every": 0} | settings
    with stepping(tiny_config(train=train, optim={"warmup_steps": 2})) as run:
        trainer, recorder = trainer_of(run)
        trainer.train()
    assert [state["step"] for state, _ in recorder.saved] == saved
    assert [state["step"] for state, is_best in recorder.saved if is_best] == best
    by_step = dict(zip(range(0, 11, 2), losses, strict=True))
    for state, _ in recorder.saved:
        assert state["best_loss"] == min(
            (by_step[step] for step in best if step <= state["step"]), default=None
        )


@pytest.mark.parametrize(
    ("evaluated", "sampled", "rows", "samples"),
    [(6, 6, [], []), (6, 3, [], [6]), (4, 6, [6], []), (4, 3, [6], [6])],
)
def test_a_continued_run_does_what_is_missing(
    tiny_config: Config, evaluated: int, sampled: int, rows: list[int], samples: list[int]
) -> None:
    with stepping(tiny_config(train={"steps": 9}, optim={"warmup_steps": 2}), *CADENCES) as run:
        progress = run.progress
        progress.step, progress.evaluated, progress.sampled = 6, evaluated, sampled
        progress.best_loss = 0.0
        trainer, recorder = trainer_of(run)
        trainer.call_back()
        trainer.call_back()  # nothing twice
    assert [row["step"] for row in recorder.rows] == rows
    assert recorder.samples == samples
    assert not recorder.saved
    assert (progress.evaluated, progress.sampled) == (6, 6)


def test_a_stop_during_validation_saves_and_leaves_it_to_the_next_start(
    tiny_config: Config, nothing_written: Path
) -> None:
    with stepping(tiny_config(train={"steps": 9}, optim={"warmup_steps": 2}), *CADENCES) as run:
        asked: list[bool] = []
        trainer, recorder = trainer_of(run, lambda: bool(asked))
        trainer.step()
        trainer.step()
        asked.append(True)
        trainer.train()
    assert run.progress.step == 2
    assert not recorder.rows
    assert not recorder.samples
    ((state, best),) = recorder.saved
    assert (state["step"], state["evaluated"], best) == (2, -1, False)


def test_a_failed_write_ends_the_run_at_the_next_step(tiny_config: Config) -> None:
    with stepping(tiny_config(train={"steps": 9}, optim={"warmup_steps": 2})) as run:
        trainer, recorder = trainer_of(run)

        def fail() -> None:
            if run.progress.step == 3:
                raise OSError("no space")

        recorder.check = fail  # type: ignore[method-assign]
        with pytest.raises(OSError, match="no space"):
            trainer.train()
    assert run.progress.step == 3


def test_the_headline_of_a_mixture(tiny_config: Config, tmp_path: Path) -> None:
    data = {
        str(make_dataset(tmp_path / name, words(count), words(300, 1))): weight
        for name, count, weight in (("a", 4000, 1.0), ("b", 1000, 3.0))
    }
    config = tiny_config(data={"path": data, "tokenizer": str(tmp_path / "a")})
    with stepping(config, "--train.micro_batch_size", "32") as run:
        lines = run.headline().splitlines()
        windows = [order.windows for order in run.data.orders]
    assert lines[3] == "  batch  1 rank × 1 micro-batch × 32 sequences × 32 tokens"
    for line, path, share, count in zip(lines[4:], data, (0.25, 0.75), windows, strict=True):
        epochs = 20 * 32 * share / count
        assert line.startswith(f"  data   {path}: {share} of the batch, ")
        assert line.endswith(f" windows, {epochs:.3g} epochs")
