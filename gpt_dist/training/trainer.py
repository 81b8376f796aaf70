"""The training loop.

At the top of each turn the run stands after ``step`` updates. What is due there (validation,
sample, checkpoint) follows from the step and from what has been done at it already, so that a run
that was stopped anywhere continues with exactly what is missing.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt_dist.checkpoints.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    Progress,
    empty_model,
    load_weights,
    read_state,
)
from gpt_dist.config.settings import Config
from gpt_dist.data.loader import Loader, open_datasets, to_batch
from gpt_dist.data.order import TrainingData, key_of
from gpt_dist.errors import GptDistError
from gpt_dist.evaluation.tasks import HellaSwagRow, hellaswag, read_hellaswag
from gpt_dist.evaluation.validation import Validation, evaluating, validate
from gpt_dist.inference.decoder import generate
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from gpt_dist.optim.schedules import learning_rate
from gpt_dist.parallel import world as distributed
from gpt_dist.parallel.engine import Engine, pick_dtype
from gpt_dist.parallel.world import World
from gpt_dist.training import run_directory
from gpt_dist.training.memory import keep_freed_memory
from gpt_dist.training.metrics import Row
from gpt_dist.training.monitor import Monitor, human, profiler
from gpt_dist.training.setup import (
    compile_blocks,
    count_steps,
    make_engine,
    pretrained,
    with_vocabulary,
)
from gpt_dist.training.signals import StopSignal
from gpt_dist.training.throughput import peak_flops

MAX_SKIPPED = 10
"""Updates in a row that may be skipped for a non-finite gradient norm."""

SAMPLE_TOKENS = 128
"""Length of the samples that are written during training."""

SETTLED_STEPS = 3
"""Steps after which a collective must answer within ``parallel.timeout``."""


def train(config: Config) -> None:
    """Train, or continue, the run that a configuration describes.

    Raises:
        UsageError: the configuration cannot be run here.
        GptDistError: the run failed; what it wrote is whole.
    """
    with StopSignal() as stop, distributed.start(config.device) as world:
        Trainer(config, world, stop).run()


class Trainer:
    """One rank's part in a run. Making one touches nothing on disk but the directory's lock."""

    def __init__(self, config: Config, world: World, stop: StopSignal) -> None:
        self.world, self.stop = world, stop
        self.progress, self.saved = Progress(), 0
        self.stopping, self.skipped = False, 0
        self.pending: PendingStep | None = None
        self.datasets = world.together(lambda: open_datasets(config))
        self.tokenizer = self.datasets[0].tokenizer
        self.config = config = world.together(lambda: with_vocabulary(config, self.tokenizer))
        self.data = world.together(lambda: TrainingData(config, self.datasets))
        self.total_steps = count_steps(config, self.data.windows)
        self.out_dir = Path(config.out_dir)
        self.hellaswag = world.together(self._read_hellaswag)
        self.start = world.together(lambda: run_directory.find_start(config, world))
        self.engine = world.together(self._make_engine)
        self.first_step = self.saved = self.progress.step
        self.directory = world.decide(lambda: run_directory.RunDirectory(self.out_dir))
        token = world.broadcast(self.directory.token if self.directory else None)
        world.together(lambda: run_directory.check_shared(self.out_dir, token))

    def run(self) -> None:
        """Train until the last step, or until asked to stop."""
        config, world = self.config, self.world
        if self.progress.step >= self.total_steps:
            self._say(f"{self.out_dir}: complete, all {self.progress.step} steps are done")
            return
        self.peak = peak_flops(world.device, self.dtype)
        micro_batch, self.accumulation = config.micro_batch(world.size)
        self._say(self._headline(micro_batch))
        self.engine.warm_up(to_batch(self.data.sequences(np.arange(micro_batch)), world.device))
        world.decide(lambda: run_directory.write_config(config))
        self.monitor = world.decide(lambda: Monitor(config, self.progress, self.total_steps))
        self.writer = CheckpointWriter(self.out_dir / "checkpoints", config.train.keep_checkpoints)
        self.loader = Loader(
            self.data,
            batch_sequences=config.batch_sequences,
            micro_batch=micro_batch,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            consumed=self.progress.sequences,
        )
        try:
            with profiler(
                self.out_dir, enabled=config.train.profile and world.is_main
            ) as self.trace:
                self._loop()
            world.decide(self.writer.wait)
        finally:
            self.writer.close()
            self.loader.close()
            if self.monitor:
                with suppress(OSError):  # all that matters was flushed with the last checkpoint
                    self.monitor.close()
        if self.monitor:
            self.monitor.draw()
        if self.stopping and self.progress.step < self.total_steps:
            self._say(f"stopped after step {self.progress.step}; the same command continues")
        else:
            self._say(f"done: {self.out_dir}, {self.total_steps} steps")

    def _loop(self) -> None:
        train, progress = self.config.train, self.progress
        self.lap = time.perf_counter()
        while True:
            step, last = progress.step, progress.step == self.total_steps
            evaluate = progress.evaluated != step and (
                due(train.eval_every, step, last)
                or due(self.config.eval.hellaswag_every, step, last)
            )
            sample = due(train.sample_every, step, last) and progress.sampled != step
            save = step != self.saved and (last or due(train.checkpoint_every, step, last))
            if evaluate or sample or save:
                self._settle()
            improved = evaluate and not self.stopping and self._evaluate()
            if sample and not self.stopping:
                self._sample()
            if save or (improved and step) or (self.stopping and step != self.saved):
                self._settle()
                self._save(best=improved)
            if last or self.stopping:
                return
            if evaluate or sample or save:
                self.lap = time.perf_counter()
            launched = self._launch_step()
            self._settle()
            self.pending = launched
            if self.world.device.type != "cuda":
                self._settle()

    def _launch_step(self) -> PendingStep:
        """One optimizer step; on a GPU it is only queued, and read while the next one runs."""
        config, progress, world = self.config, self.progress, self.world
        lr = learning_rate(progress.step, config.optim, self.total_steps)
        exact = torch.float32 if world.device.type == "mps" else torch.float64
        numbers = torch.zeros(3, dtype=exact, device=world.device)
        for micro, batch in enumerate(self.loader.step()):
            if config.model.dropout:
                torch.manual_seed(key_of(config.seed, progress.step, micro, world.rank) >> 1)
            numbers[0] += self.engine.micro_step(batch, last=micro == self.accumulation - 1)
        if self.stop():
            numbers[1] = 1
        world.all_reduce(numbers)
        numbers[2] = self.engine.step(lr)
        progress.step += 1
        progress.sequences = self.loader.consumed
        self.trace.step()
        if progress.step == self.first_step + SETTLED_STEPS:
            world.set_timeout(config.parallel.timeout)
        return PendingStep(progress.step, progress.sequences, lr, numbers)

    def _settle(self) -> None:
        """Read and log the step that was launched last, and whether any rank was asked to stop."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        loss, stop, norm = pending.read()
        now = time.perf_counter()
        seconds, self.lap = now - self.lap, now
        self.stopping = self.stopping or stop > 0
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.monitor:
            self.writer.check()
            context, tokens = self.config.model.context_length, self.config.train.batch_tokens
            speed = tokens / seconds
            flops = speed * self.engine.model.flops_per_token() / self.world.size
            self.monitor.train(
                {
                    "step": pending.step,
                    "train_loss": loss / tokens,
                    "lr": pending.lr,
                    "grad_norm": norm,
                    "tokens": pending.sequences * context,
                    "tokens_per_second": speed,
                    "mfu": flops / self.peak if self.peak else None,
                    "step_ms": seconds * 1e3,
                }
            )
        if self.skipped >= MAX_SKIPPED:
            raise GptDistError(
                f"step {pending.step}: the gradient norm was not finite {MAX_SKIPPED} times in a "
                "row, so nothing is learned any more; lower optim.lr, lengthen optim.warmup_steps "
                f"or look at the data, and start again (checkpoints: {self.out_dir}/checkpoints)"
            )

    def _evaluate(self) -> bool:
        """Validate; returns whether this is the best so far. Sets ``stopping`` if interrupted."""
        progress, config = self.progress, self.config
        last = progress.step == self.total_steps
        row: Row = {"step": progress.step}
        improved = False
        if due(config.train.eval_every, progress.step, last):
            result = self._validate()
            if self.stopping:
                return False
            if result:
                row |= {"val_loss": result.loss, "val_bpb": result.bits_per_byte}
                improved = progress.best_loss is None or result.loss < progress.best_loss
                if improved and progress.step:
                    progress.best_loss = result.loss
        if due(config.eval.hellaswag_every, progress.step, last):
            with evaluating(self.engine.model):
                scores = hellaswag(
                    self.engine.model,
                    self.tokenizer,
                    self.hellaswag,
                    styles=("completion",),
                    world=self.world,
                    dtype=self.dtype,
                )
            row |= {f"hellaswag_{name}": mean.value for name, mean in scores["completion"].items()}
        progress.evaluated = progress.step
        if self.monitor and len(row) > 1:
            self.monitor.validation(row)
        return improved

    def _validate(self) -> Validation | None:
        """Loss over the validation splits, None where there are none. Sets ``stopping``."""
        splits = [
            (d.split("val"), w)
            for d, w in zip(self.datasets, self.config.data.path.values(), strict=True)
        ]
        present = [(s, w) for s, w in splits if s is not None and len(s) > 1]
        if not present:
            return None
        result = validate(
            self.engine,
            [s for s, _ in present],
            [w for _, w in present],
            self.tokenizer.byte_lengths,
            self.config,
            self.world,
            self.stop,
        )
        self.stopping = self.stopping or result is None
        return result

    def _read_hellaswag(self) -> list[HellaSwagRow]:
        if not self.config.eval.hellaswag_every:
            return []
        return read_hellaswag(self.config.eval.hellaswag_path)

    def _sample(self) -> None:
        """Let rank 0 write some text, the same whatever the number of ranks."""
        step = self.progress.sampled = self.progress.step
        with self.engine.whole_weights():
            if self.monitor is None:
                return
            with evaluating(self.engine.model):
                sampling = SamplingParams(
                    top_k=50, seed=key_of(self.config.seed, "sample", step) >> 1
                )
                eot = self.tokenizer.eot_id
                prompt = [self.data.first_token() if eot is None else eot]
                room = self.config.model.context_length - len(prompt)
                ids = generate(self.engine.model, prompt, sampling, min(SAMPLE_TOKENS, room))
                self.monitor.sample(step, self.tokenizer.decode(ids))

    def _save(self, *, best: bool) -> None:
        """Take a checkpoint; it is written while training goes on."""
        state = {
            **asdict(self.progress),
            "config": self.config.model_dump(),
            "fingerprint": self.data.fingerprint,
            "optimizer": self.config.optim.name,
            "versions": {"torch": torch.__version__, "gpt_dist": version("gpt_dist")},
        }
        if self.monitor:
            self.monitor.flush()
        self.writer.save(
            self.engine.full_state(),
            state,
            self.tokenizer,
            vocab_size=self.engine.model.vocab_size,
            best=best,
            write=self.world.is_main,
        )
        self.saved = self.progress.step

    def _make_engine(self) -> Engine:
        """Model and optimizer, with the state to start from."""
        config, start, world = self.config, self.start, self.world
        self.dtype = pick_dtype(config.train.precision, world.device)
        if world.device.type == "cpu":
            keep_freed_memory()
        reader = None
        if start is not None:
            state = read_state(start)
            run_directory.check_same_run(config, state, self.data.fingerprint, start)
            self.progress = Progress(**{f.name: state[f.name] for f in fields(Progress)})
            model = empty_model(config.model)
            reader = CheckpointReader(start, model)
            load_weights(model, reader.weights(), start)
        elif config.train.init_from:
            model = pretrained(config, self.tokenizer)
        else:
            torch.manual_seed(config.seed)
            model = GPT(config.model)
        model = model.to(world.device).train()
        self.compiled = compile_blocks(model, config.train.compile, world.device)
        engine = make_engine(model, world, config, self.dtype)
        if reader:
            engine.load_optimizer(reader)
        return engine

    def _headline(self, micro_batch: int) -> str:
        config, world = self.config, self.world
        model = self.engine.model
        begin = f"continuing {self.start}" if self.start else "starting"
        return (
            f"{begin}: {human(model.num_parameters())} parameters, {self.total_steps} steps of "
            f"{human(config.train.batch_tokens)} tokens "
            f"({world.size} ranks x {self.accumulation} x {micro_batch} sequences of "
            f"{config.model.context_length}), {str(self.dtype).removeprefix('torch.')} on "
            f"{world.device.type}, {self.compiled}\n"
            f"data: {', '.join(config.data.path)} ({human(self.data.windows)} windows)   "
            f"run: {self.out_dir}"
        )

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


@dataclass
class PendingStep:
    """A step that was launched; its numbers may still be on their way from the device."""

    step: int
    sequences: int
    lr: float
    numbers: Tensor
    """Summed loss over all ranks, ranks that were asked to stop, gradient norm."""

    def __post_init__(self) -> None:
        if self.numbers.device.type == "cuda":
            host = torch.empty(3, dtype=self.numbers.dtype, pin_memory=True)
            host.copy_(self.numbers, non_blocking=True)
            self.numbers, self._arrived = host, torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[float, float, float]:
        """Wait for the numbers."""
        if hasattr(self, "_arrived"):
            self._arrived.synchronize()
        loss, stop, norm = self.numbers.tolist()
        return loss, stop, norm


def due(every: int, step: int, last: bool) -> bool:
    """Whether something that happens every so many steps (0 = never) happens at ``step``."""
    return every > 0 and (last or step % every == 0)
