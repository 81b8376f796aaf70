"""Optimizers that start fast."""

from __future__ import annotations

from inspect import unwrap

import torch


class Lean(torch.optim.Optimizer):
    """An optimizer without ``torch._dynamo``, whose import takes a quarter of a run's start.

    PyTorch wraps these methods to keep ``torch.compile`` out of them. Nobody compiles them here.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
