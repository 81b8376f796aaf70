"""Memory of one rank: weights, gradients and optimizer state by strategy, and activations.

N is the number of parameters, R the number of ranks. Weights, gradients and moments are fp32, also
where matrix products are in bf16 (torch.autocast, and DeepSpeed's ``torch_autocast``). What ZeRO
shards: Rajbhandari et al. 2019, arXiv:1910.02054, section 5. DeepSpeed's buffers and its copies:
deepspeed/runtime/zero/stage_1_and_2.py and stage3.py of version 0.19, as a test measures them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from gpt_dist.config.settings import Config
from gpt_dist.model.gpt import GPT
from gpt_dist.ops.cross_entropy import CHUNK_BYTES
from gpt_dist.parallel.zero import read_json
from gpt_dist.training.reporting.formatting import file_size

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default of ``reduce_bucket_size``."""

LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of ``stage3_max_live_parameters``, gathered at the same time."""

CONTEXT_BYTES = 1.5e9
"""What CUDA, NCCL and fragmentation take on a GPU, roughly."""


class Part(NamedTuple):
    """A part of the memory of one rank."""

    name: str
    size: float
    """In bytes."""
    formula: str
    on_host: bool = False
    """Whether it is in the memory of the host, beside the device."""


def activation_bytes(config: Config, micro_batch: int, *, low_precision: bool = True) -> float:
    """Estimated activation memory of one rank, in bytes.

    About 34 * width bytes per layer and token in 16-bit precision. That leaves out attention
    scores, which the fused kernel does not store (Korthikanti et al. 2022, arXiv:2205.05198,
    section 4.1). With activation checkpointing: one block's activations and every block's input.
    """
    model = config.model
    tokens = micro_batch * model.context_length
    layer = 34.0 * tokens * model.n_embd
    if config.train.precision == "fp32" or not low_precision:
        layer *= 2
    if model.activation_checkpointing:
        return layer + 4.0 * tokens * model.n_embd * model.n_layer
    return layer * model.n_layer


def optimizer_bytes(model: GPT, config: Config, copies: int = 1) -> tuple[float, str]:
    """Bytes of the optimizer's state of the whole model, and their formula.

    Args:
        model: whose parameters count.
        config: of the run.
        copies: ranks that have whole weights and share Muon's momentum, for the bytes of each.
    """
    parameters = model.num_parameters()
    moments, formula = moment_bytes(model, config, copies)
    if config.optim.average:
        return moments + 4.0 * parameters, f"{formula} + 4 N (average)"
    return moments, formula


def moment_bytes(model: GPT, config: Config, copies: int) -> tuple[float, str]:
    """The part of ``optimizer_bytes`` that updates need."""
    parameters = model.num_parameters()
    if config.optim.name == "adamw":
        return 8.0 * parameters, "8 N"
    matrices = sum(
        shape[0] * shape[1]
        for name, shape in model.shapes.items()
        if name.startswith("h.") and len(shape) == 2
    )
    if copies > 1:
        size = 8.0 * (parameters - matrices) + 4.0 * matrices / copies
        return size, "8 (N - M) + 4 M / R, M in matrices of the blocks"
    return 8.0 * parameters - 4.0 * matrices, "8 N - 4 × matrices of the blocks"


def state_parts(model: GPT, config: Config, ranks: int) -> list[Part]:
    """Weights, gradients and optimizer state of one rank under ``parallel.strategy``.

    With ``parallel.offload`` what is updated is on the host, with a second copy of the gradients,
    in stage 2 also of the weights.
    """
    n = model.num_parameters()
    stage = zero_stage(config)
    moments, formula = optimizer_bytes(model, config, 1 if stage else ranks)
    host = config.parallel.offload and stage >= 2

    def part(name: str, per_model: float, formula: str, from_stage: int, on_host: bool) -> Part:
        shard = stage >= from_stage
        return Part(name, per_model / (ranks if shard else 1), formula + " / R" * shard, on_host)

    copies = 2 if host and stage == 2 else 1
    parts = [
        part("weights", 4.0 * n, "4 N", 3, False),
        part("gradients", (8.0 if host else 4.0) * n, "8 N" if host else "4 N", 2, host),
        part("optimizer state", moments, formula, 1, host),
    ]
    if stage:
        parts.append(part("copy of weights", 4.0 * copies * n, f"{4 * copies} N", 1, host))
    if host and stage == 2:
        largest = 4.0 * max(math.prod(shape) for shape in model.shapes.values())
        for on_host in (False, True):
            parts.append(Part("transfers", largest, "4 × the largest parameter", on_host))
    return parts


def zero_stage(config: Config) -> int:
    """The stage of ZeRO; DDP is like stage 0."""
    return config.parallel.zero_stage if config.parallel.strategy == "deepspeed" else 0


def pass_parts(model: GPT, config: Config, ranks: int, *, low_precision: bool) -> list[Part]:
    """What a forward and a backward pass of one rank add."""
    micro_batch, _ = config.micro_batch(ranks)
    per_unit = 34 if low_precision else 68
    formula = f"about {per_unit} × width × tokens × layers"
    if config.model.activation_checkpointing:
        formula = f"about width × tokens × ({per_unit} + 4 × layers)"
    size = activation_bytes(config, micro_batch, low_precision=low_precision)
    parts = [Part("activations", size, formula)]
    logits = micro_batch * config.model.context_length * model.vocab_size
    logits_size = logits * (2.0 if low_precision else 4.0)
    parts.append(Part("logits", min(CHUNK_BYTES, logits_size), "a chunk of 268 MB at most"))
    return parts


def gpu_parts(model: GPT, config: Config, *, low_precision: bool) -> list[Part]:
    """What a GPU holds beside that: copies for 16-bit products, buffers, CUDA itself."""
    n = model.num_parameters()
    parts = []
    if low_precision:
        parts.append(Part("bf16 weights", 2.0 * n, "2 N, cast by autocast for each pass"))
    if zero_stage(config):
        given: dict[str, Any] = {}
        if file := config.parallel.deepspeed_config:
            given = read_json(Path(file)).get("zero_optimization", {})
        bucket = given.get("reduce_bucket_size", BUCKET_ELEMENTS)
        parts.append(Part("bucket", 4.0 * bucket, "4 × DeepSpeed's reduce_bucket_size"))
        if zero_stage(config) == 3:
            live = given.get("stage3_max_live_parameters", LIVE_ELEMENTS)
            formula = f"4 N, at most {file_size(4.0 * live)}"
            parts.append(Part("gathered weights", 4.0 * min(n, live), formula))
    parts.append(Part("CUDA, NCCL", CONTEXT_BYTES, "roughly, with fragmentation"))
    return parts


def memory_parts(
    model: GPT, config: Config, ranks: int, *, low_precision: bool, gpu: bool
) -> list[Part]:
    """All parts of the memory of one rank, the host's last."""
    parts = state_parts(model, config, ranks)
    parts += pass_parts(model, config, ranks, low_precision=low_precision)
    if gpu:
        parts += gpu_parts(model, config, low_precision=low_precision)
    return sorted(parts, key=lambda part: part.on_host)


def device_bytes(parts: list[Part]) -> float:
    """The sum on the device."""
    return sum(part.size for part in parts if not part.on_host)
