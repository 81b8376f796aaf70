"""Schedules of the learning rate and of Muon's momentum."""

from __future__ import annotations

import math

from gpt_dist.config.settings import OptimConfig

WSD_DECAY = 0.2
"""Share of the steps during which ``wsd`` decays (MiniCPM, arXiv:2404.06395: 0.1 to 0.2)."""


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """Learning rate of update ``step`` (0-based) in a run of ``steps`` updates."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = steps - config.warmup_steps
    if config.schedule == "wsd":
        decay = max(1, round(steps * WSD_DECAY))
        left = min(1.0, (steps - step) / decay)
    else:
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / max(1, span))))
    return config.min_lr + left * (config.lr - config.min_lr)


def momentum(step: int, config: OptimConfig) -> float:
    """Muon's momentum of update ``step`` (0-based)."""
    if step >= config.momentum_warmup_steps:
        return config.momentum
    share = step / config.momentum_warmup_steps
    return config.momentum_start + share * (config.momentum - config.momentum_start)
