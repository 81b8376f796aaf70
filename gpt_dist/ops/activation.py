"""Elementwise functions by the CPU's kernels: ``gelu`` and ``relu2``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt_dist.ops import native_training as native


def activate(name: str, x: Tensor) -> Tensor:
    """The function of ``x`` (bf16 or fp32, of a CPU), without a graph."""
    x = x.contiguous()
    y = torch.empty_like(x)
    native.run(name, x.dtype, x, y, x.numel())
    return y


def activate_backward(name: str, x: Tensor, grad: Tensor, y: Tensor | None = None) -> Tensor:
    """Gradients of the inputs from those of the outputs; ``y`` receives the outputs again."""
    x = x.contiguous()
    grad_x = torch.empty_like(x)
    native.run(f"{name}_backward", x.dtype, x, grad.contiguous(), grad_x, y, x.numel())
    return grad_x


class Activation(torch.autograd.Function):
    """A differentiable function, by name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return activate(name, x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return activate_backward(ctx.name, x, grad_outputs[0]), None
