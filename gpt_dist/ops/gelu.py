"""GELU in its tanh approximation (arXiv:1606.08415), as GPT-2 uses it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops import native_training as native
from gpt_dist.ops.registry import register


def gelu(x: Tensor) -> Tensor:
    """tanh GELU, elementwise."""
    y: Tensor = _gelu(x)
    return y


def _reference(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _cpu(x: Tensor) -> Tensor:
    if native.takes(x):
        y: Tensor = _Gelu.apply(x)  # type: ignore[no-untyped-call]
        return y
    return _reference(x)


def gelu_forward(x: Tensor) -> Tensor:
    """GELU by the kernel, without a graph."""
    x = x.contiguous()
    y = torch.empty_like(x)
    native.run("gelu", x.dtype, x, y, x.numel())
    return y


def gelu_backward(x: Tensor, grad: Tensor, y: Tensor | None = None) -> Tensor:
    """Gradients of the inputs from those of the outputs; ``y`` receives the outputs again."""
    x = x.contiguous()
    grad_x = torch.empty_like(x)
    native.run("gelu_backward", x.dtype, x, grad.contiguous(), grad_x, y, x.numel())
    return grad_x


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu_forward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gelu_backward(x, grad_outputs[0])


_gelu = register("gelu(Tensor x) -> Tensor", _reference, cpu=_cpu)
