"""Dropout that costs little on a CPU.

PyTorch's draws one element at a time there, which took a quarter of a small model's step. Here the
generator's 64-bit numbers serve as eight random bytes each, compared with a threshold; so on a CPU
the share that is dropped is a multiple of 1/256, and what is kept is scaled for exactly that.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    """Zero what a mask does not keep (None keeps all), in place; nothing is scaled."""
    if mask is None:
        return values
    bits = _BITS[values.itemsize]
    values.view(bits).bitwise_and_(mask if bits == torch.int16 else mask.to(bits))
    return values


class Dropout(nn.Module):
    """Zero a share of the elements in training, and scale the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return cast(Tensor, _cpu_dropout(x, dropped_share(self.rate)))
        return F.dropout(x, self.rate)


def _cpu_dropout(x: Tensor, dropped: int) -> Any:
    return _Dropout.apply(x, dropped)  # type: ignore[no-untyped-call]


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
