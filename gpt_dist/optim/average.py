"""A moving average of the weights, as part of the optimizer's state.

Over the last part of a run it is often better than the weights themselves, as if the learning rate
had decayed further (Izmailov et al. 2018, arXiv:1803.05407).
"""

from __future__ import annotations

import torch
from torch import Tensor

AVERAGE = "average"
"""Its name in the state of each tensor."""


def begin_average(optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> None:
    """Let the average of some tensors begin with what they are now."""
    for tensor in tensors:
        optimizer.state[tensor][AVERAGE] = tensor.detach().clone()


@torch.no_grad()
def advance_average(optimizer: torch.optim.Optimizer, tensors: list[Tensor], decay: float) -> None:
    """Move the average of some tensors towards what they are now: by 1 - ``decay`` of the way."""
    averages = [optimizer.state[tensor][AVERAGE] for tensor in tensors]
    torch._foreach_lerp_(averages, [tensor.detach() for tensor in tensors], 1 - decay)
