"""Validation loss over a fixed stretch of text; the number of ranks does not change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from gpt_dist.config.settings import Config
from gpt_dist.data.loader import IGNORE, validation_batches
from gpt_dist.data.shards import TokenStream
from gpt_dist.parallel.engine import Engine
from gpt_dist.parallel.world import World


class ValidationSplit(NamedTuple):
    """The validation split of a data set, with the data set's name and weight in the mixture."""

    name: str
    stream: TokenStream
    weight: float


class Validation(NamedTuple):
    """Scores over all validation splits, weighted as the mixture is."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Bits per byte of text, which is comparable between tokenizers."""
    losses: dict[str, float]
    """``loss`` of each data set by its name; empty where there is only one."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode (no dropout); afterwards restore the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def validate(
    engine: Engine,
    splits: list[ValidationSplit],
    byte_lengths: np.ndarray,
    config: Config,
    world: World,
    stop: Callable[[], bool],
) -> Validation | None:
    """Loss over the validation splits, and on each of them. Collective.

    Args:
        engine: evaluates a batch; switched to evaluation mode meanwhile.
        splits: at least one.
        byte_lengths: (vocabulary,) bytes of text that each token encodes.
        stop: whether this rank was asked to stop.

    Returns:
        The scores, or None if some rank was asked to stop meanwhile.
    """
    parts = []
    with evaluating(engine.model):
        for split in splits:
            part = _validate_one(engine, split.stream, byte_lengths, config, world, stop)
            if part is None:
                return None
            parts.append(part)
    weights = [split.weight for split in splits]
    loss, bits_per_byte = np.array(weights) / sum(weights) @ np.array(parts)
    losses = {split.name: part[0] for split, part in zip(splits, parts, strict=True)}
    return Validation(float(loss), float(bits_per_byte), losses if len(splits) > 1 else {})


def _validate_one(
    engine: Engine,
    stream: TokenStream,
    byte_lengths: np.ndarray,
    config: Config,
    world: World,
    stop: Callable[[], bool],
) -> tuple[float, float] | None:
    """Nats per token and bits per byte of one split; None if some rank was asked to stop."""
    context = config.model.context_length
    micro_batch, _ = config.micro_batch(world.size)
    predictions = min(config.train.eval_tokens or len(stream), len(stream) - 1)
    batches = validation_batches(
        stream,
        context=context,
        tokens=predictions,
        micro_batch=micro_batch,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    exact = torch.float32 if world.device.type == "mps" else torch.float64
    lengths = torch.from_numpy(byte_lengths.astype(np.int32)).to(world.device)
    totals = torch.zeros(2, dtype=exact, device=world.device)
    for batch in batches:  # the same number on every rank, so that all ranks ask
        if world.any(stop()):
            return None
        totals[0] += engine.evaluate(batch)
        counted = batch.targets != IGNORE
        totals[1] += (lengths[batch.targets.clamp(min=0)] * counted).sum()
    nats, length = world.all_reduce(totals).tolist()
    return nats / predictions, nats / math.log(2) / max(1.0, length)
