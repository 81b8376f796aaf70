"""Dropout, cheap on a CPU.

PyTorch draws one number per element there, which took a quarter of a small model's step. Here each
64-bit draw yields eight random bytes, each compared with a threshold. The rate on a CPU is
therefore a multiple of 1/256, and kept elements are scaled for exactly that rate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops.registry import concrete, register

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dropped_share(dropout: float) -> int:
    """A dropout rate in 256ths."""
    return min(255, max(1, round(256 * dropout)))


def keep_mask(
    shape: tuple[int, ...], dropped: int, generator: torch.Generator | None = None
) -> Tensor:
    """Random int16 of a shape: -1 (all bits) where to keep, 0 with probability dropped / 256."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    drawn = words.view(torch.uint8)[:count].view(shape).to(torch.int16)
    # A comparison and a product with booleans are ten times slower than this arithmetic.
    return drawn.neg_().add_(dropped - 1).bitwise_right_shift_(15)


def drop_(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zero in place what the mask drops (None keeps all); nothing is scaled."""
    if mask is None:
        return values
    bits = _BITS[values.itemsize]
    values.view(bits).bitwise_and_(mask if bits == torch.int16 else mask.to(bits))
    return values


def dropout(x: Tensor, rate: float) -> Tensor:
    """Zero a share of the elements and scale the others up.

    Args:
        x: any shape.
        rate: share that is zeroed; on a CPU rounded to a multiple of 1/256.
    """
    y: Tensor = _dropout(x, rate)
    return y


def _reference(x: Tensor, rate: float) -> Tensor:
    return F.dropout(x, rate)


def _cpu(x: Tensor, rate: float) -> Tensor:
    if not rate or not concrete(x):
        return _reference(x, rate)
    y: Tensor = _Dropout.apply(x, dropped_share(rate))  # type: ignore[no-untyped-call]
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        mask = keep_mask(tuple(x.shape), dropped)
        ctx.keep = 1 - dropped / 256
        ctx.save_for_backward(mask.to(torch.int8))
        return drop_(x / ctx.keep, mask)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return drop_(grad_outputs[0] / ctx.keep, mask.to(torch.int16)), None


_dropout = register("dropout(Tensor x, float rate) -> Tensor", _reference, cpu=_cpu)
