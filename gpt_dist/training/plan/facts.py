"""What is known about a run before it starts, and what could not be found out."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gpt_dist.checkpoints.reader import describe_model
from gpt_dist.config.command_line import Command
from gpt_dist.config.planning import PlanOptions
from gpt_dist.config.settings import Config
from gpt_dist.data.catalog import prepare_command
from gpt_dist.data.dataset import DATASET_FILE, Dataset, open_dataset
from gpt_dist.data.order import TrainingData
from gpt_dist.errors import UsageError
from gpt_dist.evaluation.tasks import read_hellaswag
from gpt_dist.model.empty import meta_model
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.engine import pick_dtype
from gpt_dist.parallel.world import env_world_size, pick_device
from gpt_dist.parallel.zero import build_config
from gpt_dist.text.gpt2_vocabulary import VOCAB_SIZE
from gpt_dist.text.tokenizers import Tokenizer, load_tokenizer
from gpt_dist.training.pretrained import pretrained, shape_of_run, with_source_shape
from gpt_dist.training.setup import count_steps, open_data, with_vocabulary
from gpt_dist.training.starting_point import Start, find_start

ASSUMED = {"char": (71, "characters of the bundled plays"), "bpe": (8192, "prepare's default")}
"""Vocabulary that data of an unknown tokenizer is assumed to have, and why; otherwise GPT-2's."""


@dataclass(frozen=True)
class DataPart:
    """One data set of the mixture."""

    directory: str
    share: float
    """Of the sequences."""
    tokens: int | None
    """Of the training split; None where the data is not there."""
    validation: int | None
    """Tokens of the validation split."""
    windows: int | None
    """Sequences of one epoch."""


@dataclass(frozen=True)
class Plan:
    """A run that is not going to start."""

    config: Config
    """With the model's whole shape."""
    ranks: int
    options: PlanOptions
    device: torch.device
    """What the ranks are planned to run on; of a GPU that is not here, without an index."""
    model: GPT
    """Without weights."""
    vocabulary: str
    """Where its size is from."""
    parts: list[DataPart]
    start: Start | None
    """The checkpoint that the run would continue."""
    unchecked: list[str] = field(default_factory=list)
    """What can only be checked elsewhere or later, a line each."""

    @property
    def parameters(self) -> int:
        return self.model.num_parameters()

    @property
    def windows(self) -> int | None:
        """Sequences of one epoch; None where a part of the data is missing."""
        counts = [part.windows for part in self.parts if part.windows is not None]
        return sum(counts) if len(counts) == len(self.parts) else None

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where ``train.epochs`` of unknown data decide."""
        if self.config.train.epochs is not None and self.windows is None:
            return None
        return count_steps(self.config, self.windows or 0)

    @property
    def low_precision(self) -> bool:
        """Whether matrix products are in 16 bits."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return self.config.train.precision != "fp32"
        return pick_dtype(self.config.train.precision, self.device) != torch.float32


def make_plan(command: Command) -> Plan:
    """Find out what can be found out, and refuse what would be refused.

    Raises:
        UsageError: the run would be refused.
        GptDistError: the data or a checkpoint is damaged.
    """
    config, ranks = command.config, command.plan.ranks or env_world_size()
    unchecked: list[str] = []
    device = planned_device(command, unchecked)
    missing = [path for path in config.data.path if not has_data(Path(path))]
    unchecked += [
        f"the data: {path} is not there; make it with: {prepare_command(Path(path))}"
        for path in missing
    ]
    if missing:
        present = [path for path in config.data.path if path not in missing]
        datasets = {path: open_dataset(path, config.data.tokenizer) for path in present}
    else:
        datasets = dict(zip(config.data.path, open_data(config), strict=True))
    tokenizer = next((dataset.tokenizer for dataset in datasets.values()), None)
    config, vocabulary = with_model(config, tokenizer, ranks)
    data = TrainingData(config, list(datasets.values())) if not missing else None
    start = find_start(Path(config.out_dir), config, data.fingerprint if data else None)
    check_files(config, ranks, unchecked, new=start is None)
    return Plan(
        config=config,
        ranks=ranks,
        options=command.plan,
        device=device,
        model=meta_model(config.model),
        vocabulary=vocabulary,
        parts=data_parts(config, datasets),
        start=start,
        unchecked=unchecked,
    )


def planned_device(command: Command, unchecked: list[str]) -> torch.device:
    """The device of a rank: the one here, or a GPU if the options describe a cluster."""
    name, options = command.config.device, command.plan
    try:
        device = pick_device(name)
    except UsageError as error:
        unchecked.append(f"the device: {error}")
        return torch.device(name)
    elsewhere = name == "auto" and device.type == "cpu" and (options.ranks or options.device_memory)
    return torch.device("cuda") if elsewhere else device


def has_data(directory: Path) -> bool:
    """Whether a data set is there, whole or not."""
    return (directory / DATASET_FILE).exists() or any(directory.glob("*.bin"))


def with_model(config: Config, tokenizer: Tokenizer | None, ranks: int) -> tuple[Config, str]:
    """The configuration with the model's whole shape, and where its vocabulary is from."""
    inherits = config.train.init_from is not None
    config = with_source_shape(config, tokenizer, ranks)
    if tokenizer is None and inherits and shape_of_run(config) is None:
        _, tokenizer = describe_model(config.train.init_from or "")
    if tokenizer is None and "tokenizer" in config.data.model_fields_set:
        tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer is not None:
        return with_vocabulary(config, tokenizer), f"tokenizer {tokenizer.name}"
    if config.model.vocab_size is not None:
        return config, "model.vocab_size"
    kind = Path(next(iter(config.data.path))).name.rpartition("-")[2]
    size, reason = ASSUMED.get(kind, (VOCAB_SIZE, "GPT-2's"))
    model = config.model.model_copy(update={"vocab_size": size})
    return config.model_copy(update={"model": model}), f"assumed: {reason}"


def data_parts(config: Config, datasets: dict[str, Dataset]) -> list[DataPart]:
    """Size and share of each data set of the mixture."""
    total = sum(config.data.path.values())
    parts = []
    for path, weight in config.data.path.items():
        tokens = validation = windows = None
        if path in datasets:
            alone = config.data.model_copy(update={"path": {path: 1.0}})
            data = TrainingData(config.model_copy(update={"data": alone}), [datasets[path]])
            tokens, windows = len(datasets[path].split("train") or ()), data.windows
            validation = len(datasets[path].split("val") or ())
        parts.append(DataPart(path, weight / total, tokens, validation, windows))
    return parts


def check_files(config: Config, ranks: int, unchecked: list[str], *, new: bool) -> None:
    """Read the files that settings name.

    Raises:
        UsageError: one is missing or not valid.
        GptDistError: the weights to start from are damaged.
    """
    if new and config.train.init_from is not None:
        pretrained(config)
    if config.parallel.strategy == "deepspeed":
        build_config(config, torch.float32, ranks)
        if importlib.util.find_spec("deepspeed") is None:
            raise UsageError("parallel.strategy = deepspeed: deepspeed is not installed")
    if config.eval.hellaswag_every and config.eval.hellaswag_path is not None:
        read_hellaswag(config.eval.hellaswag_path)
    elif config.eval.hellaswag_every:
        unchecked.append("HellaSwag: it is downloaded from the hub when the run starts")
