"""Every setting of a training run, once: field = YAML key = command-line flag = documentation.

    config = load(["--config", "shakespeare-char", "--train.steps", "500"])

reads the preset (or YAML file), lays the dotted overrides over it and validates the whole. All
problems are reported together, each with the key, the value and what would be valid.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gpt_dist.errors import UsageError

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


def _mixture(value: Any) -> Any:
    """Accept ``DIR``, ``DIR:0.7,DIR2:0.3``, a list of directories or a mapping to weights."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        weighted = [re.fullmatch(r"(.+):([0-9.eE+-]+)", part) for part in parts]
        return {
            m[1] if m else part: m[2] if m else 1.0 for part, m in zip(parts, weighted, strict=True)
        }
    if isinstance(value, list):
        return dict.fromkeys(map(str, value), 1.0)
    return value


def _not_empty(value: dict[str, float]) -> dict[str, float]:
    if not value:
        raise ValueError("name at least one data directory")
    return value


Mixture = Annotated[dict[str, Positive], BeforeValidator(_mixture), AfterValidator(_not_empty)]


class ModelConfig(Section):
    n_layer: CountOrZero = 12
    """Transformer blocks; 0 is the bigram baseline (embedding and head only)."""
    n_head: Count = 12
    """Attention heads; must divide n_embd."""
    n_embd: Count = 768
    """Width of the residual stream."""
    mlp_hidden: Count | None = None
    """Width inside the MLP; null = 4 * n_embd."""
    context_length: Count = 1024
    """Longest sequence the model sees, in tokens."""
    vocab_size: Count | None = None
    """Tokens the model knows; null = as many as the data set's tokenizer has."""
    dropout: Fraction = 0.0
    """Dropout on embeddings, attention weights and residual branches."""
    bias: bool = True
    """Biases in linear layers and layer norms."""
    qkv_bias: bool | None = None
    """Bias of the query/key/value projection; null = as `bias`."""
    tie_embeddings: bool = True
    """Share the token embedding with the output head."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norm before each branch (GPT-2) or after each addition (GPT-1)."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""


class DataConfig(Section):
    path: Mixture = Field(default={"data/fineweb-edu-10BT": 1.0}, validate_default=True)
    """Prepared data set: DIR, or several with weights as DIR:0.7,DIR2:0.3."""
    tokenizer: str = "gpt2"
    """Tokenizer of shards that have no dataset.json: gpt2, or a tokenizer.json."""
    shuffle: Literal["full", "blocks", "none"] = "full"
    """full: over the whole data set; blocks: block by block, for network file systems; none."""
    stride: Count | None = None
    """Tokens between the starts of two windows; null = context_length (no overlap)."""


class OptimConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon (matrices by Muon, the rest by AdamW)."""
    lr: Positive = 6e-4
    """Peak learning rate."""
    min_lr: NonNegative = 6e-5
    """Learning rate at the end of the schedule."""
    warmup_steps: CountOrZero = 715
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to min_lr; wsd (constant, linear over the last fifth); constant."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    beta2: Fraction = 0.95
    """Decay of AdamW's second moment."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm; 0 = no clipping."""


class TrainConfig(Section):
    steps: Count | None = 19073
    """Optimizer steps; ignored where train.epochs is set."""
    epochs: Positive | None = None
    """Passes over the data set, in place of train.steps."""
    batch_tokens: Count = 524288
    """Tokens of one optimizer step over all ranks; gradient accumulation follows from it."""
    micro_batch_size: Count = 16
    """Most sequences in one forward pass on one rank; lowered to divide the batch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the matrix products; weights stay fp32. auto = bf16 where the device has it."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile; auto tries it on CUDA and falls back, saying why."""
    init_from: str | None = None
    """Start from the weights of this checkpoint, run or Hugging Face directory."""
    eval_every: CountOrZero = 250
    """Steps between validations (and before the first step and after the last); 0 = never."""
    eval_tokens: Count | None = 10485760
    """Validation tokens, the same ones each time; null = the whole split."""
    checkpoint_every: CountOrZero = 1000
    """Steps between checkpoints; 0 = only the last (and the best)."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep beside the best by validation loss."""
    sample_every: CountOrZero = 1000
    """Steps between samples from the model; 0 = never."""
    profile: bool = False
    """Write a trace of steps 10 to 12 to OUT_DIR/profile."""


class EvalConfig(Section):
    hellaswag_every: CountOrZero = 0
    """Steps between HellaSwag evaluations; 0 = never."""
    hellaswag_path: str | None = None
    """HellaSwag's validation file (JSON lines, may be gzipped); null = from the hub."""


class ParallelConfig(Section):
    strategy: Literal["ddp", "deepspeed"] = "ddp"
    """ddp, or deepspeed (ZeRO)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shards: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""
    offload: bool = False
    """Keep the optimizer state in host memory (ZeRO 2 and 3)."""
    deepspeed_config: str | None = None
    """JSON file with more DeepSpeed settings."""
    timeout: Positive = 600.0
    """Seconds after which a rank that does not answer ends the run."""


class Config(Section):
    """A training run."""

    out_dir: str = "runs/gpt2-124m"
    """Directory of the run: checkpoints, metrics, samples and pictures."""
    seed: CountOrZero = 1337
    """Seed of initialisation, data order, dropout and samples."""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """Device to train on."""
    resume: str = "auto"
    """auto: continue the newest checkpoint in out_dir; never; or a checkpoint's path."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def stride(self) -> int:
        return self.data.stride or self.model.context_length

    @property
    def batch_sequences(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self.train.batch_tokens // self.model.context_length

    def micro_batch(self, world_size: int) -> tuple[int, int]:
        """Sequences of one forward pass on one rank, and how many of them make a step."""
        per_rank = self.batch_sequences // world_size
        size = next(
            n for n in range(min(self.train.micro_batch_size, per_rank), 0, -1) if per_rank % n == 0
        )
        return size, per_rank // size


def combination_problems(config: Config, world_size: int = 1) -> list[str]:
    """What is wrong with settings that are each valid alone; one line each."""
    problems = []
    model, train, optim = config.model, config.train, config.optim
    if model.n_embd % model.n_head:
        problems.append(f"model.n_head = {model.n_head}: must divide model.n_embd = {model.n_embd}")
    if model.n_layer == 0 and model.norm == "post":
        problems.append("model.norm = post: needs at least one layer, but model.n_layer = 0")
    if optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr = {optim.min_lr:g}: must be at most optim.lr = {optim.lr:g}")
    if train.steps is None and train.epochs is None:
        problems.append("train.steps = null: set train.steps or train.epochs")
    if train.epochs is None and train.steps is not None and optim.warmup_steps > train.steps:
        problems.append(
            f"optim.warmup_steps = {optim.warmup_steps}: "
            f"must be at most train.steps = {train.steps}"
        )
    quantum = model.context_length * world_size
    if train.batch_tokens % quantum:
        near = max(1, round(train.batch_tokens / quantum)) * quantum
        problems.append(
            f"train.batch_tokens = {train.batch_tokens}: must be a multiple of "
            f"model.context_length * ranks = {model.context_length} * {world_size} = {quantum}, "
            f"for example {near}"
        )
    parallel = config.parallel
    if parallel.strategy != "deepspeed":
        for key in ("offload", "deepspeed_config"):
            if getattr(parallel, key):
                problems.append(f"parallel.{key}: needs parallel.strategy = deepspeed")
    elif parallel.offload and parallel.zero_stage < 2:
        problems.append(
            f"parallel.offload = true: needs parallel.zero_stage 2 or 3, not {parallel.zero_stage}"
        )
    return problems


# --- reading: presets, YAML files, command line -------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that ``6e-4`` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Plain YAML data (no objects are ever constructed)."""
    return yaml.load(text, Loader=_Loader)


def preset_directory() -> Path:
    """``configs/`` of the checkout, or its copy inside the installed package."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def presets() -> list[str]:
    """Names that ``--config`` knows without a path."""
    return sorted(path.stem for path in preset_directory().glob("*.yaml"))


def read_config_file(name: str) -> dict[str, Any]:
    """Settings of a preset or a YAML file, as nested dictionaries.

    Raises:
        UsageError: no such preset or file, or the file is not a mapping in YAML.
    """
    path = Path(name)
    if not path.is_file():
        path = preset_directory() / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(
            f"--config {name}: no such file or preset; presets: {', '.join(presets())}"
        )
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data or {}, dict):
        raise UsageError(f"--config {path}: expected a mapping of settings, got {data!r:.60}")
    return data or {}


def flags(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted flag → pydantic field, for every leaf setting."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= flags(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def choices(annotation: Any) -> str:
    """What a field accepts, in words: ``pre | post``, ``a whole number``, …"""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return choices(args[0])
    if origin is dict:
        return "DIR or DIR:WEIGHT,DIR:WEIGHT"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(choices(arg) for arg in args)
    names = {bool: "true | false", int: "a whole number", float: "a number", str: "text"}
    return names.get(annotation, "null" if annotation is type(None) else "a value")


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``gpt_dist.train``: only for ``--help`` and shell completion."""
    parser = argparse.ArgumentParser(
        prog="gpt_dist.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="[torchrun --nproc_per_node=N -m | python -m] gpt_dist.train "
        "[--config NAME|FILE] [--dry-run] [--section.key value ...]",
        description="Train GPT-2. Without flags: the gpt2-124m preset.\n\n"
        "  python -m gpt_dist.train --config shakespeare-char-cpu\n"
        "  torchrun --nproc_per_node=8 -m gpt_dist.train --train.micro_batch_size 32\n\n"
        f"presets: {', '.join(presets())}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        default="gpt2-124m",
        help="preset or YAML file (default: gpt2-124m)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory, steps and tokens, and exit",
    )
    groups: dict[str, Any] = {}
    for flag, field in flags().items():
        section = flag.split(".")[0] if "." in flag else "run"
        group = groups.setdefault(section, parser.add_argument_group(section))
        default = "null" if field.default is None else field.default
        group.add_argument(
            f"--{flag}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{field.description} [{choices(field.annotation)}; default {default}]".replace(
                "%", "%%"
            ),
        )
    return parser


def load(argv: list[str]) -> tuple[Config, bool]:
    """Parse a command line into a validated configuration.

    Returns:
        The configuration and whether ``--dry-run`` was given.

    Raises:
        UsageError: with every problem found, a line each.
        SystemExit: after printing ``--help``.
    """
    if "-h" in argv or "--help" in argv:
        make_parser().parse_args(["--help"])
    known = flags()
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    special: dict[str, str] = {"config": "gpt2-124m"}
    dry_run = False
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--dry-run":
            dry_run = True
            continue
        if not argument.startswith("--"):
            problems.append(f"{argument}: expected --section.key value")
            continue
        if not equals:
            if not rest or (rest[0].startswith("--") and rest[0][2:3].isalpha()):
                problems.append(f"--{name}: needs a value")
                continue
            value = rest.pop(0)
        if name in special:
            special[name] = value
        elif name in known:
            overrides[name] = value
        else:
            problems.append(unknown_key(f"--{name}", name, [*known, "config", "dry-run"]))
    try:
        data = read_config_file(special["config"])
    except UsageError as error:
        raise UsageError("\n".join([str(error), *problems])) from None
    for name, value in overrides.items():
        *sections, key = name.split(".")
        target = data
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[key] = parse_scalar(value)
    return build(data, problems), dry_run


def parse_scalar(text: str) -> Any:
    """A command-line value as YAML would read it; what YAML cannot read is text."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def build(data: dict[str, Any], problems: list[str] | None = None) -> Config:
    """Validate nested dictionaries; raise one UsageError that lists every problem."""
    problems = list(problems or [])
    config = None
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += _explain(error)
    if config is not None:
        problems += combination_problems(config, int(os.environ.get("WORLD_SIZE", "1")))
    if problems or config is None:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    return config


def _explain(error: ValidationError) -> list[str]:
    """Pydantic's findings, one line a key: key, value, what would be valid."""
    known, lines = flags(), {}
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        # Union members and mapping keys add parts to the location: cut back to the setting.
        key = next(
            (".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known),
            ".".join(path),
        )
        if item["type"] == "extra_forbidden":
            lines[key] = unknown_key(key, key, list(known))
        elif key in known:
            detail = item["msg"][0].lower() + item["msg"][1:]
            valid = choices(known[key].annotation)
            again = lines.get(key)
            lines[key] = f"{key} = {_show(item['input'])}: {detail} (valid: {valid})"
            if again:  # several union members failed: the choices say it all
                lines[key] = f"{key} = {_show(item['input'])}: valid is {valid}"
        else:
            lines[key] = f"{key} = {_show(item['input'])}: expected a mapping of settings"
    return list(lines.values())


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def unknown_key(shown: str, key: str, known: list[str]) -> str:
    """``--trian.steps: no such setting; did you mean train.steps?``"""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        last = key.rpartition(".")[2]
        close = [name for name in known if name.rpartition(".")[2] == last][:1]
    hint = f"; did you mean {close[0]}?" if close else "; --help lists them"
    return f"{shown}: no such setting{hint}"


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``--config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
