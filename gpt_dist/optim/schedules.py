"""Schedules of the learning rate, of Muon's momentum and of the average of the weights."""

from __future__ import annotations

import math

from gpt_dist.config.settings import OptimConfig


def decay_start(config: OptimConfig, steps: int) -> int:
    """The step from which ``wsd`` decays, in a run of ``steps`` updates."""
    return steps - max(1, round(steps * config.decay_share))


def remaining(share: float, config: OptimConfig) -> float:
    """How high ``wsd`` is between ``min_lr`` (0) and ``lr`` (1) with a share of the decay left.

    Linear: MiniCPM, arXiv:2404.06395; sqrt: Hägele et al. 2024, arXiv:2405.18392.
    """
    if config.decay_shape == "cosine":
        return 0.5 * (1 - math.cos(math.pi * share))
    if config.decay_shape == "sqrt":
        return 1 - math.sqrt(1 - share)
    return share**config.decay_power if config.decay_shape == "power" else share


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """Learning rate of update ``step`` (0-based) in a run of ``steps`` updates."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = steps - config.warmup_steps
    if config.schedule == "wsd":
        first = decay_start(config, steps)
        left = remaining(min(1.0, (steps - step) / (steps - first)), config)
    else:
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / max(1, span))))
    return config.min_lr + left * (config.lr - config.min_lr)


def averaging(step: int, config: OptimConfig, steps: int) -> float | None:
    """Decay of the average of the weights at update ``step`` (0-based); None before its part."""
    first = steps - max(1, round(steps * config.average_share))
    return config.average if config.average and step >= first else None


def momentum(step: int, config: OptimConfig) -> float:
    """Muon's momentum of update ``step`` (0-based)."""
    if step >= config.momentum_warmup_steps:
        return config.momentum
    share = step / config.momentum_warmup_steps
    return config.momentum_start + share * (config.momentum - config.momentum_start)
