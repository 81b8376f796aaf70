"""What happens between two steps: validate, score, sample, save.

``make_callbacks`` lists them. Between two steps the trainer goes through the list and calls each
that is due. To add one, write a class with these two methods and add a line to the list. One that
scores the model belongs before ``WriteScores`` and calls ``trainer.add_scores``; one that changes
what a checkpoint holds belongs before ``Save``.

Whether something is due follows from the step and from ``Progress`` alone, which says what has
been done at this step already. So a run that was stopped anywhere continues with what is missing.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

import torch

from gpt_dist.checkpoints.writer import CheckpointWriter
from gpt_dist.config.settings import Config, TrainConfig
from gpt_dist.data.order import key_of
from gpt_dist.evaluation.tasks import HellaSwagRow, hellaswag, read_hellaswag
from gpt_dist.evaluation.validation import evaluating, validate
from gpt_dist.inference.generation import generate
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.parallel.world import World
from gpt_dist.training.health import Health

if TYPE_CHECKING:
    from gpt_dist.training.trainer import Trainer

SAMPLE_TOKENS = 128
"""Length of a sample in tokens."""

BEST_SHARE = 20
"""Number of equal parts of a run; in each, a lower validation loss may write one checkpoint."""

HEARTBEAT = 0.5
"""Seconds between two collectives while world rank 0 waits for its disk."""


class Callback(Protocol):
    """Something that happens between two steps. Every rank asks and calls in the same order.

    All answers must be the same on all ranks, because calls may be collective. On a GPU a callback
    waits for the step that is in flight, so one that is due at every step costs speed.
    """

    def due(self, trainer: Trainer) -> bool:
        """Whether to call it now. It is asked again after the step in flight was read."""
        ...

    def __call__(self, trainer: Trainer) -> None:
        """Run the callback."""
        ...


def make_callbacks(config: Config, writer: CheckpointWriter) -> list[Callback]:
    """The callbacks of a run, in order.

    Raises:
        GptDistError: HellaSwag is wanted and cannot be read.
    """
    train, evaluation = config.train, config.eval
    rows = read_hellaswag(evaluation.hellaswag_path) if evaluation.hellaswag_every else []
    return [
        Validate(train.eval_every),
        HellaSwag(evaluation.hellaswag_every, rows),
        Health(train.health_every),
        WriteScores(),
        Sample(train.sample_every),
        Save(train, writer),
    ]


def to_score(trainer: Trainer, every: int) -> bool:
    """Whether to score the model at this step, for a score with this cadence."""
    evaluated = trainer.run.progress.evaluated == trainer.run.progress.step
    return trainer.on_schedule(every) and not evaluated and not trainer.stopping


class Validate:
    """Loss over the validation splits, and on each data set of a mixture."""

    def __init__(self, every: int) -> None:
        self.every = every

    def due(self, trainer: Trainer) -> bool:
        return to_score(trainer, self.every)

    def __call__(self, trainer: Trainer) -> None:
        run = trainer.run
        trainer.add_scores({})
        if not run.validation:
            return
        result = validate(
            run.engine,
            run.validation,
            run.tokenizer.byte_lengths,
            run.config,
            run.world,
            trainer.stop,
        )
        if result is None:
            trainer.stopping = True
            return
        trainer.add_scores(
            {"val_loss": result.loss, "val_bpb": result.bits_per_byte}
            | {f"val_loss/{name}": loss for name, loss in result.losses.items()}
        )


class HellaSwag:
    """Accuracy on HellaSwag's validation set."""

    def __init__(self, every: int, rows: list[HellaSwagRow]) -> None:
        self.every, self.rows = every, rows

    def due(self, trainer: Trainer) -> bool:
        return to_score(trainer, self.every)

    def __call__(self, trainer: Trainer) -> None:
        run = trainer.run
        with evaluating(run.engine.model):
            scores = hellaswag(
                run.engine.model,
                run.tokenizer,
                self.rows,
                styles=("completion",),
                world=run.world,
                dtype=run.dtype,
            )
        means = scores["completion"].items()
        trainer.add_scores({f"hellaswag_{name}": mean.value for name, mean in means})


class WriteScores:
    """Writes the scores of the callbacks before it as one row."""

    def due(self, trainer: Trainer) -> bool:
        return trainer.scores is not None and not trainer.stopping

    def __call__(self, trainer: Trainer) -> None:
        progress = trainer.run.progress
        if trainer.scores:
            trainer.monitor.validation({"step": progress.step} | trainer.scores)
        progress.evaluated = progress.step


class Sample:
    """Lets rank 0 write some text, the same whatever the number of ranks."""

    def __init__(self, every: int) -> None:
        self.every = every

    def due(self, trainer: Trainer) -> bool:
        progress = trainer.run.progress
        sampled = progress.sampled == progress.step
        return trainer.on_schedule(self.every) and not sampled and not trainer.stopping

    def __call__(self, trainer: Trainer) -> None:
        run = trainer.run
        step = run.progress.sampled = run.progress.step
        with run.engine.whole_weights():
            if not run.world.is_main:
                return
            seed = key_of(run.config.seed, "sample", step) >> 1
            eot = run.tokenizer.eot_id
            prompt = [run.data.first_token() if eot is None else eot]
            length = min(SAMPLE_TOKENS, run.config.model.context_length - len(prompt))
            with evaluating(run.engine.model):
                sampling = SamplingParams(top_k=50, seed=seed)
                ids = generate(run.engine.model, prompt, sampling, length)
            trainer.monitor.sample(step, run.tokenizer.decode(ids))


class Save:
    """Takes a checkpoint, which is written while training goes on.

    On schedule, after the last step, before the run stops, and now and then because the validation
    loss is lower than that of the best checkpoint. All of it follows from the step and the losses,
    so a run that was interrupted has the same best checkpoint as one that was not.
    """

    def __init__(self, config: TrainConfig, writer: CheckpointWriter) -> None:
        self.config, self.writer = config, writer

    def due(self, trainer: Trainer) -> bool:
        self.writer.check()  # a write that failed ends the run now, not at the next checkpoint
        wanted = self.on_schedule(trainer) or trainer.stopping
        return self.is_best(trainer) or (wanted and trainer.run.progress.step != trainer.saved)

    def on_schedule(self, trainer: Trainer) -> bool:
        """Whether there is a regular checkpoint at this step."""
        cadences = self.config.checkpoint_every, self.config.keep_every
        special = trainer.is_last or trainer.run.progress.step == trainer.run.decay_start
        return special or any(trainer.on_schedule(every) for every in cadences)

    def is_best(self, trainer: Trainer) -> bool:
        """Whether the checkpoint of this step is the best so far and worth being written.

        Early in a run almost every validation improves, and checkpoints are large. So only the
        first validation after each multiple of ``best_every`` may write one that is not due anyway.
        """
        step, best = trainer.run.progress.step, trainer.run.progress.best_loss
        loss = (trainer.scores or {}).get("val_loss")
        if not step or loss is None or not math.isfinite(loss):
            return False
        if best is not None and loss >= best:
            return False
        every = self.config.best_every
        if every is None:
            every = max(1, trainer.run.total_steps // BEST_SHARE)
        before = step - self.config.eval_every
        return self.on_schedule(trainer) or (every > 0 and step // every > before // every)

    def __call__(self, trainer: Trainer) -> None:
        run, best = trainer.run, self.is_best(trainer)
        if best and trainer.scores:
            run.progress.best_loss = trainer.scores["val_loss"]
        state = {
            **asdict(run.progress),
            "config": run.config.model_dump(),
            "fingerprint": run.data.fingerprint,
            "optimizer": run.config.optim.name,
            "versions": {"torch": torch.__version__, "gpt_dist": version("gpt_dist")},
        }
        trainer.monitor.flush()
        finish_writing(self.writer, run.world)
        self.writer.save(
            run.engine.full_state(),
            state,
            run.tokenizer,
            vocab_size=run.engine.model.vocab_size,
            best=best,
            write=run.world.is_main,
        )
        trainer.saved = run.progress.step


def finish_writing(writer: CheckpointWriter, world: World) -> None:
    """Wait until the checkpoint that world rank 0 is writing is on the disk. Collective.

    A slow disk may take longer than ``parallel.timeout``. The other ranks would run into it in
    their next collective, so all of them wait here, in one short collective after the other.
    """
    while world.any(writer.busy(HEARTBEAT)):
        pass
