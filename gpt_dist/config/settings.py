"""Every setting of a training run, defined once.

A field's name is the YAML key and the command-line flag; its docstring is the help text.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    model_validator,
)

from gpt_dist.config.architectures import ARCHITECTURES, Architecture, Name

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


DEFAULT_TOKENIZER = "gpt2"


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False
    )


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
    if isinstance(value, dict):
        return {str(directory): weight for directory, weight in value.items()}
    return value


def _not_empty(value: dict[str, float]) -> dict[str, float]:
    if not value:
        raise ValueError("name at least one data directory")
    return value


def _numbers(value: Any) -> Any:
    """Accept ``1,2,3`` as well as a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Triple = Annotated[tuple[float, float, float], BeforeValidator(_numbers)]
Mixture = Annotated[dict[str, Positive], BeforeValidator(_mixture), AfterValidator(_not_empty)]


class ModelConfig(Section):
    architecture: Name = "gpt2"
    """gpt2; or nanochat: rotary positions, norms without weights, squared ReLU, capped logits."""
    n_layer: CountOrZero = 12
    """Transformer blocks; 0 is the bigram baseline (embedding and head only)."""
    n_head: Count = 12
    """Attention heads; must divide n_embd."""
    n_kv_head: Count | None = None
    """Heads of keys and values, each for n_head / n_kv_head heads of queries; null = n_head. Fewer
    need less memory for the KV cache. gpt2 always has n_head."""
    n_embd: Count = 768
    """Width of the residual stream."""
    mlp_hidden: Count | None = None
    """Width inside the MLP; null = 4 * n_embd."""
    context_length: Count = 1024
    """Longest sequence the model sees, in tokens."""
    vocab_size: Count | None = None
    """Size of the vocabulary; null = that of the data set's tokenizer."""
    dropout: Fraction = 0.0
    """Dropout on embeddings, attention weights and residual branches."""
    bias: bool = True
    """Biases in linear layers and layer norms; nanochat has none."""
    qkv_bias: bool | None = None
    """Bias of the query/key/value projection; null = same as `bias`."""
    tie_embeddings: bool = True
    """Share the token embedding with the output head; false by default for nanochat."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norm before each branch (GPT-2) or after each addition (GPT-1)."""
    zero_projections: bool = False
    """Begin with zeros in the projections into the residual stream, so that at first every block
    passes on what it gets."""
    zero_head: bool = False
    """Begin with zeros in the output head, so that at first all tokens are equally likely."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    @model_validator(mode="wrap")
    @classmethod
    def _with_defaults(cls, data: Any, handler: ModelWrapValidatorHandler[ModelConfig]) -> Any:
        """Fill in the architecture's own defaults; they do not count as set by the user."""
        if not isinstance(data, dict):
            return handler(data)
        names = [name for name in ARCHITECTURES if name == data.get("architecture", "gpt2")]
        defaults = ARCHITECTURES[names[0]].defaults if names else {}
        filled = {key: value for key, value in defaults.items() if key not in data}
        model = handler(data | filled)
        model.model_fields_set.difference_update(filled)
        return model

    @property
    def parts(self) -> Architecture:
        """What the architecture is made of."""
        return ARCHITECTURES[self.architecture]

    @property
    def has_vectors(self) -> bool:
        """Whether there are parameters that are no matrices."""
        return self.bias or bool(self.qkv_bias) or self.parts.norm == "layer"

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.n_embd // self.n_head

    @property
    def hidden(self) -> int:
        """Width inside the MLP."""
        return self.mlp_hidden or 4 * self.n_embd

    @property
    def shape(self) -> dict[str, Any]:
        """What decides which weights the model has, without nulls that mean another setting."""
        return {
            "architecture": self.architecture,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_kv_head": self.kv_heads,
            "n_embd": self.n_embd,
            "mlp_hidden": self.hidden,
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "bias": self.bias,
            "qkv_bias": self.bias if self.qkv_bias is None else self.qkv_bias,
            "tie_embeddings": self.tie_embeddings,
            "norm": self.norm,
        }


class DataConfig(Section):
    path: Mixture = Field(default={"data/fineweb-edu-sample-10BT": 1.0}, validate_default=True)
    """Prepared data set: DIR, or several with weights as DIR:0.7,DIR2:0.3."""
    tokenizer: str = DEFAULT_TOKENIZER
    """Tokenizer of shards that have no dataset.json: gpt2, or the path of a tokenizer.json."""
    shuffle: Literal["full", "blocks", "none"] = "full"
    """full: over the whole data set; blocks: block by block, for network file systems; none."""
    rows: Literal["stream", "documents"] = "stream"
    """stream: windows of the text as it lies; documents: each row begins where a document begins,
    is filled with the documents that fit best, and the last one is cropped."""
    stride: Count | None = None
    """Tokens between the starts of two windows; null = context_length (no overlap)."""


class KindConfig(Section):
    """How one kind of parameters is updated, where that differs from the others."""

    lr: Positive | None = None
    """Peak learning rate; null = optim.lr. It follows the schedule of optim.lr in proportion."""
    beta1: Fraction | None = None
    """Decay of AdamW's first moment; null = optim.beta1."""
    beta2: Fraction | None = None
    """Decay of AdamW's second moment; null = optim.beta2."""
    weight_decay: NonNegative | None = None
    """Decoupled weight decay; null = optim.weight_decay, of vectors 0."""


class RatesConfig(Section):
    """Learning rate, betas and weight decay by kind of parameters."""

    matrices: KindConfig = KindConfig()
    """Of attention and MLP."""
    embedding: KindConfig = KindConfig()
    """Of tokens and positions; of tokens also the head where it is tied."""
    head: KindConfig = KindConfig()
    """The output head where it is not tied."""
    vectors: KindConfig = KindConfig()
    """Biases and layer norms."""


class OptimConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon (matrices by Muon, the rest by AdamW)."""
    lr: Positive = 6e-4
    """Peak learning rate. Muon's best is several times AdamW's: 5e-3 is a good start."""
    min_lr: NonNegative = 6e-5
    """Learning rate at the end of the schedule."""
    warmup_steps: CountOrZero = 715
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine; wsd (constant, then to min_lr at the end, the decay); constant."""
    decay_share: Share = 0.2
    """Share of the steps that wsd's decay takes."""
    decay_shape: Literal["linear", "cosine", "sqrt", "power"] = "linear"
    """Shape of wsd's decay. Where a share x of it is left: linear x; cosine; sqrt 1 - √(1 - x);
    power x to the power of decay_power."""
    decay_power: Positive = 2.0
    """Exponent of the shape power."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, on matrices and embeddings only."""
    beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    beta2: Fraction = 0.95
    """Decay of AdamW's second moment."""
    eps: Positive = 1e-8
    """What AdamW adds to the root of the second moment."""
    rates: RatesConfig = RatesConfig()
    """By kind of parameters, where one differs."""
    average: Fraction = 0.0
    """Decay of a moving average of the weights over the last part of the run, which checkpoints
    hold beside the weights; 0 = none."""
    average_share: Share = 0.2
    """Share of the steps that the average is over."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    skip_loss_z: NonNegative = 0.0
    """Skip an update whose loss is more than this many standard deviations above the mean of the
    last 128 steps; 0 = never. 6 is a usual value."""
    skip_norm_z: NonNegative = 0.0
    """The same for the gradient norm before clipping."""
    momentum: Fraction = 0.95
    """Muon's momentum."""
    momentum_start: Fraction = 0.85
    """Muon's momentum at the first step of its warm-up."""
    momentum_warmup_steps: CountOrZero = 0
    """Steps in which Muon's momentum rises linearly from momentum_start; 0 = no warm-up."""
    nesterov: bool = True
    """Muon's momentum looks ahead, as Nesterov's."""
    newton_schulz_steps: Count = 5
    """Iterations with which Muon orthogonalises a matrix."""
    newton_schulz_coefficients: Triple = (3.4445, -4.7750, 2.0315)
    """Of x, x³ and x⁵ in the polynomial of one iteration."""
    newton_schulz_precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of those iterations. bf16 is enough to train with; in fp32 the losses hardly
    depend on the number of ranks, which bf16's rounding changes by some 1e-5."""
    split_qkv: bool = True
    """Muon orthogonalises queries, keys and values each by itself; false = as one matrix."""


class TrainConfig(Section):
    steps: Count | None = 19073
    """Optimizer steps; ignored where train.epochs is set."""
    epochs: Positive | None = None
    """Passes over the data set's windows, in place of train.steps. Where windows overlap
    (data.stride), a pass shows each token several times."""
    batch_tokens: Count = 524288
    """Tokens of one optimizer step over all ranks; gradient accumulation follows from it."""
    micro_batch_size: Count = 16
    """Maximum sequences in a forward pass of one rank; lowered until it divides the batch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of matrix products; weights stay fp32. auto = bf16 where hardware supports it."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """dtype in which blocks add to their input where matrix products are bf16; bf16 moves fewer
    bytes on a GPU, and loses precision."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of the blocks; auto tries it on CUDA and falls back, saying why."""
    init_from: str | None = None
    """Start from the weights of this checkpoint, run or Hugging Face directory. The model gets its
    shape, so flags for the shape can be left out."""
    eval_every: CountOrZero = 250
    """Steps between validations; also before the first step and after the last. 0 = never."""
    eval_tokens: Count | None = 10485760
    """Validation tokens, the same ones each time; null = the whole split."""
    checkpoint_every: CountOrZero = 1000
    """Steps between checkpoints; 0 = only the last (and the best)."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep beside the best by validation loss."""
    keep_every: CountOrZero = 0
    """Steps between checkpoints that are written and kept for good; 0 = none."""
    best_every: CountOrZero | None = None
    """Steps in which a lower validation loss may write one checkpoint of its own; null = a
    twentieth of the run, 1 = at every validation, 0 = only the regular checkpoints compete."""
    sample_every: CountOrZero = 1000
    """Steps between samples from the model; 0 = never."""
    health_every: CountOrZero = 0
    """Steps between scores of an update's size beside the weights, and of how well momentum agrees
    with the next gradient; 0 = never. Each costs about as much as two checkpoints."""
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

    @property
    def shards_weights(self) -> bool:
        """Whether no rank holds the whole weights (ZeRO-3)."""
        return self.strategy == "deepspeed" and self.zero_stage == 3


class Config(Section):
    """A training run."""

    out_dir: str = "runs/gpt2-124m"
    """Directory of the run: checkpoints, metrics, samples and pictures."""
    seed: CountOrZero = 1337
    """Seed of initialisation, data order, dropout and samples."""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """Device to train on."""
    resume: str = "auto"
    """auto: continue the newest checkpoint in out_dir; never: start a new run; or a checkpoint's
    path. A run that torchrun or Slurm restarts continues its own newest checkpoint."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def unset_shape(self) -> list[str]:
        """Settings of the model's shape that ``train.init_from`` is to fill in."""
        if self.train.init_from is None:
            return []
        return [key for key in self.model.shape if key not in self.model.model_fields_set]

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


@functools.cache
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


def setting(config: Config, flag: str) -> Any:
    """The value of a dotted setting."""
    value: Any = config
    for part in flag.split("."):
        value = getattr(value, part)
    return value


def show(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        parts = [k if w == 1 else f"{k}:{w:g}" for k, w in value.items()]
        return ",".join(parts)
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; ``--config`` reads it back as an equal one."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
