"""Skipping updates whose loss or gradient norm is an outlier, as llm.c does.

A value's z-score is its distance from the mean of the last values, itself among them, in standard
deviations of these (llm.c, ``llmc/outlier_detector.h``). It is computed on the device, so the host
waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_dist.config.settings import OptimConfig

WINDOW = 128
"""Number of values; the largest possible score is (WINDOW - 1) / √WINDOW = 11.2."""


class Spikes:
    """The last losses and gradient norms of a run.

    Args:
        config: says above which score an update is skipped.
        device: of the values.
    """

    def __init__(self, config: OptimConfig, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        limits = [config.skip_loss_z or torch.inf, config.skip_norm_z or torch.inf]
        self.limits = torch.tensor(limits, dtype=dtype, device=device)
        self.values = torch.full((2, WINDOW), torch.nan, dtype=dtype, device=device)
        """Losses and norms, the latest last; NaN where there were none yet."""
        self.scores = torch.full((2,), torch.nan, dtype=dtype, device=device)
        """Of the latest loss and norm; NaN until there are enough values."""

    def skip(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Add a step's loss and gradient norm; whether to skip its update, a bool scalar.

        A value that is not finite counts as the one before it: it is skipped anyway.
        """
        new = torch.stack([loss.detach().reshape(()), norm.reshape(())]).to(self.values)
        new = torch.where(new.isfinite(), new, self.values[:, -1])
        # In place: a checkpoint may hold on to it.
        self.values.copy_(torch.cat([self.values[:, 1:], new[:, None]], dim=1))
        deviation = self.values.std(dim=1, correction=0)
        distance = new - self.values.mean(dim=1)
        self.scores = torch.where(deviation == 0, 0.0, distance / deviation)
        return (self.scores > self.limits).any()


def make_spikes(config: OptimConfig, device: torch.device) -> Spikes | None:
    """What ``optim.skip_loss_z`` and ``optim.skip_norm_z`` ask for; None where both are 0."""
    wanted = config.skip_loss_z or config.skip_norm_z
    return Spikes(config, device) if wanted else None
