"""Addition to the residual stream, which stays fp32 while branches compute in bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt_dist.ops import native_training as native
from gpt_dist.ops.registry import register


def add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` of one shape, in the wider of the two dtypes."""
    total: Tensor = _add(x, y)
    return total


def _reference(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def _cpu(x: Tensor, y: Tensor) -> Tensor:
    if native.takes(y, torch.bfloat16) and native.takes(x, torch.float32):
        total: Tensor = _Add.apply(x, y)  # type: ignore[no-untyped-call]
        return total
    return x + y


class _Add(torch.autograd.Function):
    """fp32 + bf16 → fp32, without an fp32 copy of the second operand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        total = torch.empty_like(x)
        native.run("add", y.dtype, x, y, total, x.numel())
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return grad_outputs[0], grad_outputs[0].bfloat16()


_add = register("add(Tensor x, Tensor y) -> Tensor", _reference, cpu=_cpu)
