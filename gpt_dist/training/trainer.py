"""The training loop.

``train`` runs a configuration from start to end: ``setup`` makes the ``Run`` (data, model, engine,
position), and a ``Trainer`` steps it. Between two steps come the callbacks (``callbacks.py``).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt_dist.checkpoints.writer import CheckpointWriter
from gpt_dist.config.settings import Config, OptimConfig
from gpt_dist.data.loader import to_batch
from gpt_dist.data.order import key_of
from gpt_dist.errors import GptDistError
from gpt_dist.optim.schedules import averaging, learning_rate, momentum
from gpt_dist.parallel import world as distributed
from gpt_dist.parallel.compiling import warm_up
from gpt_dist.parallel.watchdog import print_after_agent
from gpt_dist.parallel.world import World
from gpt_dist.training.callbacks import Callback, finish_writing, make_callbacks
from gpt_dist.training.reporting.metrics import Row
from gpt_dist.training.reporting.monitor import Monitor, NoTrace, Trace, draw, profiler
from gpt_dist.training.reporting.summary import next_commands, summary
from gpt_dist.training.reporting.throughput import peak_flops
from gpt_dist.training.run_directory import RunDirectory
from gpt_dist.training.setup import Run, setup
from gpt_dist.training.signals import StopSignal

MAX_SKIPPED = 10
"""Number of updates in a row that may be skipped because the gradient norm is not finite."""

SETTLED_STEPS = 3
"""Steps after which a collective must answer within ``parallel.timeout``."""


def train(config: Config) -> None:
    """Train, or continue, the run that a configuration describes.

    Raises:
        UsageError: the configuration cannot be run here.
        GptDistError: the run failed; every file it wrote is complete.
    """
    with StopSignal() as stop, distributed.start(config.device) as world:
        last_words = train_here(config, world, stop)
        if world.is_main and stop.name == "SIGINT" and "TORCHELASTIC_RUN_ID" in os.environ:
            print_after_agent(f"(torchrun prints this traceback at every Ctrl-C)\n{last_words}")
        elif world.is_main:
            print(last_words, flush=True)


def train_here(config: Config, world: World, stop: Callable[[], bool]) -> str:
    """``train`` with the ranks of ``world``, until the end or until ``stop`` is true on any.

    Returns:
        What to print last, on world rank 0; elsewhere nothing.
    """
    started = time.monotonic()
    out_dir = Path(config.out_dir)
    train = config.train
    writer = CheckpointWriter(out_dir / "checkpoints", train.keep_checkpoints, train.keep_every)
    callbacks = world.together(lambda: make_callbacks(config, writer))
    with RunDirectory(out_dir) as directory, ExitStack() as stack:
        run = setup(config, world, directory)
        stack.callback(run.close)
        if run.is_complete:
            return f"{out_dir}: complete, all {run.progress.step} steps are done\n" + next_commands(
                out_dir
            )
        run.say(run.headline())
        writer.spare(run.decay_start)
        first = run.data.sequences(np.arange(run.micro_batch))
        warm_up(run.engine, world, config, to_batch(first, world.device))
        # Up to here nothing in the directory has changed: a run that cannot start leaves no trace.
        world.decide(lambda: directory.write_config(run.config))
        monitor = world.decide(lambda: Monitor.open(run.config, run.progress, run.total_steps))
        monitor = monitor or Monitor()
        stack.callback(monitor.close)
        stack.callback(writer.close)
        profiling = config.train.profile and world.is_main
        trace = stack.enter_context(profiler(out_dir, enabled=profiling))
        peak = peak_flops(world.device, run.dtype)
        trainer = Trainer(run, callbacks, monitor, stop, trace, peak)
        trainer.train()
        finish_writing(writer, world)
        world.decide(writer.check)
    if not world.is_main:
        return ""
    draw(out_dir)
    if run.is_complete:
        return summary(out_dir, trainer.first_step, time.monotonic() - started)
    return f"stopped after step {run.progress.step}; run the same command to resume"


class Trainer:
    """Steps a run and calls its callbacks. Making one does nothing yet.

    Args:
        run: from ``setup``.
        callbacks: what happens between two steps, in order.
        monitor: where the numbers go.
        stop: whether this rank was asked to stop.
        trace: told after each step.
        peak: FLOP/s that one device can reach; None where unknown.
    """

    def __init__(
        self,
        run: Run,
        callbacks: Sequence[Callback] = (),
        monitor: Monitor | None = None,
        stop: Callable[[], bool] = lambda: False,
        trace: Trace | None = None,
        peak: float | None = None,
    ) -> None:
        self.run, self.callbacks, self.stop, self.peak = run, callbacks, stop, peak
        self.monitor, self.trace = monitor or Monitor(), trace or NoTrace()
        self.first_step = self.saved = run.progress.step
        self.stopping = False
        """Whether any rank was asked to stop; the same on all ranks."""
        self.scores: Row | None = None
        """Scores of this step from the callbacks; None where none was due."""
        self.skipped = 0
        self.pending: PendingStep | None = None
        self.lap = time.perf_counter()

    @property
    def is_last(self) -> bool:
        """Whether all steps are done."""
        return self.run.progress.step >= self.run.total_steps

    def on_schedule(self, every: int) -> bool:
        """Whether something due every ``every`` steps (0 = never) and at the end is due now."""
        return every > 0 and (self.is_last or self.run.progress.step % every == 0)

    def add_scores(self, scores: Row) -> None:
        """Add to the row that is written for this step."""
        self.scores = (self.scores or {}) | scores

    def train(self) -> None:
        """Train until the last step, or until asked to stop."""
        self.lap = time.perf_counter()
        while True:
            self.call_back()
            if self.is_last or self.stopping:
                break
            self.step()
        self.settle()

    def call_back(self) -> None:
        """Call what is due between two steps."""
        self.scores = None
        if not any(callback.due(self) for callback in self.callbacks):
            return
        self.settle()
        for callback in self.callbacks:
            if callback.due(self):
                callback(self)
        self.lap = time.perf_counter()

    def step(self) -> None:
        """One optimizer step. On a GPU its numbers are read while the next one runs."""
        launched = self._launch()
        self.settle()
        self.pending = launched
        if self.run.world.device.type != "cuda":
            self.settle()

    def _launch(self) -> PendingStep:
        run, progress = self.run, self.run.progress
        config, world = run.config, run.world
        lr = learning_rate(progress.step, config.optim, run.total_steps)
        exact = torch.float32 if world.device.type == "mps" else torch.float64
        spikes = run.engine.spikes
        numbers = torch.zeros(3 if spikes is None else 5, dtype=exact, device=world.device)
        for micro, batch in enumerate(run.loader.step()):
            if config.model.dropout:
                torch.manual_seed(key_of(config.seed, progress.step, micro, world.rank) >> 1)
            numbers[0] += run.engine.micro_step(batch, last=micro == run.accumulation - 1)
        if self.stop():
            numbers[1] = 1
        world.all_reduce(numbers)
        numbers[2] = run.engine.step(
            lr,
            momentum(progress.step, config.optim),
            averaging(progress.step, config.optim, run.total_steps),
            numbers[0],
        )
        if spikes:
            numbers[3:] = spikes.scores
        progress.step += 1
        progress.sequences = run.loader.consumed
        self.trace.step()
        if progress.step == self.first_step + SETTLED_STEPS:
            world.set_timeout(config.parallel.timeout)
        return PendingStep(progress.step, progress.sequences, lr, numbers)

    def settle(self) -> None:
        """Read and log the step that was launched last, and whether any rank was asked to stop.

        Raises:
            GptDistError: too many updates in a row were skipped.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        loss, stop, norm, *scores = pending.read()
        now = time.perf_counter()
        seconds, self.lap = now - self.lap, now
        self.stopping = self.stopping or stop > 0
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        config = self.run.config
        tokens = config.train.batch_tokens
        speed = tokens / seconds
        flops = speed * self.run.engine.model.flops_per_token() / self.run.world.size
        if self.peak and self.run.world.device.type == "cpu":
            # Measured beside other work it came out too low; a step that beats it says so.
            self.peak = max(self.peak, flops)
        self.monitor.train(
            {
                "step": pending.step,
                "train_loss": loss / tokens,
                "lr": pending.lr,
                "grad_norm": norm,
                "tokens": pending.sequences * config.model.context_length,
                "tokens_per_second": speed,
                "mfu": flops / self.peak if self.peak else None,
                "step_ms": seconds * 1e3,
                **spike_row(scores, norm, config.optim),
            }
        )
        if self.skipped >= MAX_SKIPPED:
            raise GptDistError(
                f"step {pending.step}: the gradient norm was not finite {MAX_SKIPPED} times in a "
                "row, so the model no longer learns; lower optim.lr, lengthen optim.warmup_steps "
                f"or check the data, and start again (checkpoints: {config.out_dir}/checkpoints)"
            )


@dataclass
class PendingStep:
    """A step that was launched. On a GPU its numbers may still be on their way to the host."""

    step: int
    sequences: int
    lr: float
    numbers: Tensor
    """Loss summed over all ranks, number of ranks that were asked to stop, gradient norm; and the
    z-scores of loss and norm where they may skip an update."""

    def __post_init__(self) -> None:
        if self.numbers.device.type == "cuda":
            host = torch.empty(len(self.numbers), dtype=self.numbers.dtype, pin_memory=True)
            host.copy_(self.numbers, non_blocking=True)
            self.numbers, self._arrived = host, torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait for the numbers."""
        if hasattr(self, "_arrived"):
            self._arrived.synchronize()
        numbers: list[float] = self.numbers.tolist()
        return numbers


def spike_row(scores: list[float], norm: float, config: OptimConfig) -> Row:
    """What ``metrics.jsonl`` says of a step whose update an outlier may skip.

    Args:
        scores: z-scores of loss and gradient norm; empty where nothing is skipped for them.
        norm: the gradient norm.
        config: the limits.
    """
    if not scores:
        return {}
    limits = config.skip_loss_z, config.skip_norm_z
    above = any(limit and score > limit for score, limit in zip(scores, limits, strict=True))
    loss_z, norm_z = scores
    skipped = above or not math.isfinite(norm)
    return {"loss_z": loss_z, "grad_norm_z": norm_z, "skipped": skipped}
