"""What a run costs, computed without starting it: ``gpt_dist.train --dry-run``."""

from __future__ import annotations

from gpt_dist.config.settings import Config
from gpt_dist.data.loader import open_datasets
from gpt_dist.data.order import TrainingData
from gpt_dist.model.empty import meta_model
from gpt_dist.parallel.world import env_world_size
from gpt_dist.training.reporting.formatting import file_size
from gpt_dist.training.setup import count_steps, with_vocabulary


def activation_bytes(config: Config, micro_batch: int) -> float:
    """Estimated activation memory of one rank, in bytes.

    About 34 * width bytes per layer and token in 16-bit precision. That leaves out attention
    scores, which the fused kernel does not store (Korthikanti et al. 2022, arXiv:2205.05198,
    section 4.1). With activation checkpointing: one block's activations and every block's input.
    """
    model = config.model
    tokens = micro_batch * model.context_length
    layer = 34.0 * tokens * model.n_embd
    if config.train.precision == "fp32":
        layer *= 2
    if model.activation_checkpointing:
        return layer + 4.0 * tokens * model.n_embd * model.n_layer
    return layer * model.n_layer


def report(config: Config) -> str:
    """Parameters, memory, steps and tokens of a run, as lines of text.

    Raises:
        UsageError: there is no such data set, or it does not fit the model.
    """
    datasets = open_datasets(config)
    config = with_vocabulary(config, datasets[0].tokenizer)
    data = TrainingData(config, datasets)
    model = meta_model(config.model)
    parameters, steps = model.num_parameters(), count_steps(config, data.windows)
    world = env_world_size()
    micro_batch, accumulation = config.micro_batch(world)
    tokens = steps * config.train.batch_tokens
    epochs = steps * config.batch_sequences / data.windows
    keep_every = config.train.keep_every
    kept_for_good = steps // keep_every if keep_every else 0
    state, activations = 16 * parameters, activation_bytes(config, micro_batch)
    lines = {
        "parameters": f"{parameters:,} "
        f"({model.num_parameters(embeddings=False):,} without positions)",
        "data": f"{', '.join(config.data.path)}: {data.windows:,} windows of "
        f"{config.model.context_length} tokens, tokenizer {datasets[0].tokenizer.name}",
        "steps": f"{steps:,} of {config.train.batch_tokens:,} tokens = {world} ranks x "
        f"{accumulation} micro-batches x {micro_batch} sequences x {config.model.context_length}",
        "tokens": f"{tokens:,} ({epochs:.2f} epochs)",
        "compute": f"{tokens * model.flops_per_token():.3g} FLOPs",
        "memory": f"{file_size(state)} weights, gradients and AdamW state + about "
        f"{file_size(activations)} activations on each rank (DDP)",
        "checkpoint": f"{file_size(12 * parameters)} each, "
        f"{config.train.keep_checkpoints + 1 + kept_for_good} kept",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())
