"""From a configuration to a run that is ready for its next step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gpt_dist.checkpoints.reader import CheckpointReader, load_weights
from gpt_dist.config.settings import Config
from gpt_dist.data.dataset import Dataset
from gpt_dist.data.loader import Loader, open_datasets
from gpt_dist.data.order import TrainingData
from gpt_dist.data.rows import DocumentRows
from gpt_dist.errors import UsageError
from gpt_dist.evaluation.validation import ValidationSplit
from gpt_dist.model.empty import empty_model
from gpt_dist.model.gpt import GPT
from gpt_dist.optim.schedules import averaging, decay_start
from gpt_dist.parallel.compiling import compile_blocks
from gpt_dist.parallel.ddp import DDPEngine
from gpt_dist.parallel.engine import Engine, pick_dtype
from gpt_dist.parallel.world import World
from gpt_dist.text.tokenizers import Tokenizer, load_tokenizer
from gpt_dist.training.memory import keep_freed_memory
from gpt_dist.training.pretrained import pretrained, with_source_shape
from gpt_dist.training.progress import Progress
from gpt_dist.training.reporting.formatting import counted, human, short_names
from gpt_dist.training.run_directory import RunDirectory


@dataclass
class Run:
    """What a run is, on one rank: ready for its next step, whatever directory it belongs to."""

    config: Config
    """With ``model.vocab_size`` filled in."""
    world: World
    data: TrainingData
    validation: list[ValidationSplit]
    """Empty where no data set has a validation split."""
    tokenizer: Tokenizer
    engine: Engine
    compiled: str
    """How the blocks run, for the headline: ``eager``, ``compiled``, …"""
    dtype: torch.dtype
    """Of the matrix products; weights and updates are fp32."""
    loader: Loader
    progress: Progress
    total_steps: int
    start: Path | None
    """The checkpoint that the run continues; None for a new run."""
    notes: tuple[str, ...]
    """Lines about that start: damaged checkpoints, and settings that changed."""

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass on one rank."""
        return self.config.micro_batch(self.world.size)[0]

    @property
    def accumulation(self) -> int:
        """Forward passes of one rank in one step."""
        return self.config.micro_batch(self.world.size)[1]

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.total_steps

    @property
    def decay_start(self) -> int | None:
        """The step before ``wsd`` decays: whoever wants a longer run continues from there."""
        optim = self.config.optim
        wanted = optim.schedule == "wsd" and self.config.train.checkpoint_every > 0
        return decay_start(optim, self.total_steps) if wanted else None

    def headline(self) -> str:
        """A few lines that say what is about to run."""
        config, world = self.config, self.world
        begin = f"continuing {self.start}" if self.start else "starting"
        context = config.model.context_length
        lines = [
            f"{begin}: {config.out_dir}",
            f"  model  {human(self.engine.model.num_parameters())} parameters, "
            f"{str(self.dtype).removeprefix('torch.')} on {world.device.type}, {self.compiled}",
            f"  steps  {self.total_steps:,} of {human(config.train.batch_tokens)} tokens",
            f"  batch  {counted(world.size, 'rank')} × {counted(self.accumulation, 'micro-batch')} "
            f"× {counted(self.micro_batch, 'sequence')} × {context:,} tokens",
        ]
        sequences, weights = self.total_steps * config.batch_sequences, config.data.path
        for (path, weight), stream, order in zip(
            weights.items(), self.data.streams, self.data.orders, strict=True
        ):
            share = weight / sum(weights.values())
            part = f"{share:.3g} of the batch, " if len(weights) > 1 else ""
            what = "windows"
            if isinstance(stream, DocumentRows):
                what = f"rows of documents ({stream.share:.0%} of the tokens)"
            epochs = sequences * share / order.windows
            lines.append(
                f"  data   {path}: {part}{human(order.windows)} {what}, {epochs:.3g} epochs"
            )
        if config.stride < context:
            times = context / config.stride
            lines.append(
                f"         windows overlap (data.stride = {config.stride}): an epoch shows each "
                f"token {times:.3g} times"
            )
            if len(weights) == 1:
                lines.append(f"         and the run shows it {epochs * times:.3g} times")
        return "\n".join([*lines, *self.notes])

    def say(self, text: str) -> None:
        """Print on world rank 0."""
        if self.world.is_main:
            print(text, flush=True)

    def close(self) -> None:
        """Stop the loader's thread."""
        self.loader.close()


def setup(config: Config, world: World, directory: RunDirectory | None = None) -> Run:
    """Make a run: open the data, claim the directory, build the model and load its state.

    Collective; a problem on any rank is raised on all. Writes nothing but the directory's lock.

    Args:
        config: the run's configuration.
        world: the ranks that share a step.
        directory: says where the run continues. Without one it starts anew and leaves nothing.

    Raises:
        UsageError: the configuration cannot be run here.
        GptDistError: the data or the checkpoint is damaged, or the directory is in use.
    """
    datasets = world.together(lambda: open_data(config))
    tokenizer = datasets[0].tokenizer
    shaped = world.together(lambda: with_source_shape(config, tokenizer, world.size))
    config = world.together(lambda: with_vocabulary(shaped, tokenizer))
    data = world.together(lambda: TrainingData(config, datasets))
    start = directory.claim(config, data.fingerprint, world) if directory else None
    total_steps = count_steps(config, data.windows)
    dtype = pick_dtype(config.train.precision, world.device)
    if world.device.type == "cpu":
        keep_freed_memory()

    model = world.together(lambda: initial_model(config, start.path if start else None))
    model.low_residual = config.train.residual == "bf16"

    def build() -> tuple[Engine, str]:
        if not config.parallel.shards_weights:  # which move one at a time, to be partitioned
            model.to(world.device)
        compiled = compile_blocks(model.train(), world, config, dtype)
        engine = make_engine(model, world, config, dtype)
        if start:
            reader, step = CheckpointReader(start.path, model), start.state["step"]
            averages = step and averaging(step - 1, config.optim, total_steps) is not None
            if averages and "optimizer.average.wte.weight" in reader:
                engine.begin_average()
            engine.load_optimizer(reader)
        return engine, compiled

    engine, compiled = world.together(build)
    progress = Progress.from_state(start.state) if start else Progress()
    micro_batch, _ = config.micro_batch(world.size)
    loader = Loader(
        data,
        batch_sequences=config.batch_sequences,
        micro_batch=micro_batch,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        consumed=progress.sequences,
    )
    names, weights = short_names(config.data.path), config.data.path.values()
    validation = [
        ValidationSplit(name, stream, weight)
        for name, dataset, weight in zip(names, datasets, weights, strict=True)
        if (stream := dataset.split("val")) is not None and len(stream) > 1
    ]
    return Run(
        config=config,
        world=world,
        data=data,
        validation=validation,
        tokenizer=tokenizer,
        engine=engine,
        compiled=compiled,
        dtype=dtype,
        loader=loader,
        progress=progress,
        total_steps=total_steps,
        start=start.path if start else None,
        notes=start.notes if start else (),
    )


def open_data(config: Config) -> list[Dataset]:
    """Open the data sets, and check that ``data.tokenizer`` is theirs where the user named one.

    Raises:
        UsageError: there is no such data set, or its ``dataset.json`` names another tokenizer.
        GptDistError: a data set is damaged, or the tokenizers of a mixture differ.
    """
    datasets = open_datasets(config)
    if "tokenizer" in config.data.model_fields_set:
        named = load_tokenizer(config.data.tokenizer).to_dict()
        for dataset in datasets:
            if dataset.info and dataset.tokenizer.to_dict() != named:
                raise UsageError(
                    f"data.tokenizer = {config.data.tokenizer}: has no effect, because "
                    f"{dataset.directory} has a tokenizer of its own ({dataset.tokenizer.name}, "
                    f"{dataset.tokenizer.vocab_size} tokens); leave it out, or prepare the data "
                    "with this one"
                )
    return datasets


def count_steps(config: Config, windows: int) -> int:
    """Optimizer steps of the whole run."""
    if config.train.epochs is None:
        return config.train.steps or 0
    return max(1, int(config.train.epochs * windows) // config.batch_sequences)


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with ``model.vocab_size`` filled in.

    Raises:
        UsageError: it is set, and smaller than the tokenizer's.
    """
    size = config.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UsageError(
            f"model.vocab_size = {size}: the data's tokenizer ({tokenizer.name}) has "
            f"{tokenizer.vocab_size} tokens; leave it null"
        )
    model = config.model.model_copy(update={"vocab_size": size})
    return config.model_copy(update={"model": model})


def initial_model(config: Config, start: Path | None) -> GPT:
    """The model with the weights to start from, on the CPU.

    Raises:
        UsageError: ``train.init_from`` does not fit the model.
        GptDistError: a checkpoint has another shape, or is damaged.
    """
    if start:
        model = empty_model(config.model)
        load_weights(model, CheckpointReader(start, model).weights(), start)
        return model
    if config.train.init_from:
        return pretrained(config)
    torch.manual_seed(config.seed)
    return GPT(config.model)


def make_engine(model: GPT, world: World, config: Config, dtype: torch.dtype) -> Engine:
    """The engine that ``parallel.strategy`` names."""
    if config.parallel.strategy == "deepspeed":
        from gpt_dist.parallel.zero import DeepSpeedEngine  # seconds to import

        return DeepSpeedEngine(model, world, config, dtype)
    return DDPEngine(model, world, config, dtype)
