"""What a run starts from: its vocabulary, its length, its first weights and its engine."""

from __future__ import annotations

from typing import Literal

import torch

from gpt_dist.checkpoints.checkpoint import empty_model, load_model, load_weights
from gpt_dist.config.settings import Config
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.model.gpt import GPT, VOCAB_PARAMETERS
from gpt_dist.parallel.ddp import DDPEngine
from gpt_dist.parallel.engine import Engine
from gpt_dist.parallel.world import World
from gpt_dist.text.tokenizers import Tokenizer


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


def pretrained(config: Config, tokenizer: Tokenizer) -> GPT:
    """A model of the configured shape with the weights of ``train.init_from``.

    Raises:
        UsageError: the checkpoint has another tokenizer.
        GptDistError: it has another shape, or is damaged.
    """
    source, other, _ = load_model(config.train.init_from or "")
    if other.to_dict() != tokenizer.to_dict():
        raise UsageError(
            f"train.init_from = {config.train.init_from}: its tokenizer ({other.name}, "
            f"{other.vocab_size} tokens) is not the data's ({tokenizer.name}, "
            f"{tokenizer.vocab_size}); prepare the data with "
            f"--tokenizer {config.train.init_from}"
        )
    model = empty_model(config.model)
    weights = (
        (name, parameter[: source.vocab_size] if name in VOCAB_PARAMETERS else parameter)
        for name, parameter in source.named_parameters()
    )
    load_weights(model, weights, config.train.init_from)
    return model


def compile_blocks(model: GPT, setting: Literal["auto"] | bool, device: torch.device) -> str:
    """Compile the blocks in place as ``train.compile`` says; one compilation serves all of them.

    In place, because a wrapper would rename the parameters. Only the blocks: that starts in
    seconds, and gradients are reduced while the backward pass goes on.

    Returns:
        What was done, and why where it was not: a word for the run's headline.

    Raises:
        GptDistError: compiling was demanded and failed.
    """
    if not setting or (setting == "auto" and device.type != "cuda") or not len(model.h):
        return "eager"
    for block in model.h:
        block.compile()
    try:  # compilation happens at the first call
        width = model.config.n_embd
        with torch.autocast(device.type, dtype=torch.bfloat16):
            model.h[0](torch.zeros(1, min(16, model.config.context_length), width, device=device))
    except Exception as error:  # compilers fail in many ways, all of them worth going on without
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        if setting is True:
            raise GptDistError(f"train.compile = true: {reason}") from error
        for block in model.h:
            block._compiled_call_impl = None
        return f"eager (torch.compile failed: {reason})"
    return "compiled"


def make_engine(model: GPT, world: World, config: Config, dtype: torch.dtype) -> Engine:
    """The engine that ``parallel.strategy`` names."""
    if config.parallel.strategy == "deepspeed":
        from gpt_dist.parallel.zero import DeepSpeedEngine  # seconds to import

        return DeepSpeedEngine(model, world, config, dtype)
    return DDPEngine(model, world, config, dtype)
