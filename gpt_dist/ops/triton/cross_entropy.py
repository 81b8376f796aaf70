"""Cross-entropy and its gradient in place, a program a row, statistics in fp32.

A row of up to `HELD` bytes, such as 51,200 logits in bf16, stays in registers. It is read once and
written once, which is the least possible. Longer rows are read twice.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
BLOCK = 2048
"""Columns that a program handles together: 8 for each thread, which is one load of 16 bytes."""
HELD = 25 * BLOCK * 2
"""Most bytes of a row that stay in registers without spilling, on sm_80, sm_90 and sm_100."""
HELD_CAPPED = 20 * BLOCK * 2
"""The same where logits are capped."""


@triton.jit
def capped(logits, CAP: tl.constexpr):
    """``CAP * tanh(logits / CAP)``; 2 / infinity is 0."""
    if CAP != 0.0:
        logits = CAP - (2.0 * CAP) / (tl.exp2(logits * (2.0 * LOG2_E / CAP)) + 1.0)
    return logits


@triton.jit
def slope_of_cap(logits, CAP: tl.constexpr):
    """Derivative of `capped`, from its result."""
    level = logits * (1.0 / CAP)
    return 1.0 - level * level


@triton.jit
def held(
    logits,
    targets,
    losses,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row, which is read once.

    Args:
        logits: (N, COLUMNS), overwritten by the gradients.
        targets: (N,) int64.
        losses: (N,) fp32, written.
        COLUMNS: of a row, padding included.
        CLASSES: columns that are not padding.
        CAP: of the logits; 0.0 = none.
        BLOCK: columns of a part.
        PARTS: parts of a row.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * COLUMNS
    at = tl.arange(0, BLOCK)
    parts = ()
    for n in tl.static_range(PARTS):
        column = n * BLOCK + at
        if (n + 1) * BLOCK <= CLASSES:
            part = capped(tl.load(logits + column).to(tl.float32), CAP)
        else:
            # The mask of a load ends where vectors end: the padded row is a multiple of them.
            part = tl.load(logits + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
            part = tl.where(column < CLASSES, capped(part, CAP), -float("inf"))
        parts = parts + (part,)
    highest = parts[0]
    for n in tl.static_range(1, PARTS):
        highest = tl.maximum(highest, parts[n])
    most = tl.max(highest, 0)
    shares = ()
    sums = tl.zeros((BLOCK,), tl.float32)
    for n in tl.static_range(PARTS):
        share = tl.exp2((parts[n] - most) * LOG2_E)
        shares = shares + (share,)
        sums += share
    total = tl.sum(sums, 0)
    label = tl.load(targets + row).to(tl.int32)
    own = capped(tl.load(logits + tl.maximum(label, 0)).to(tl.float32), CAP)
    counted = label >= 0
    tl.store(losses + row, tl.where(counted, most + tl.log(total) - own, 0.0))
    scale = tl.where(counted, 1.0 / total, 0.0)
    # With a cap the logits are needed again, and registers do not hold the shares beside them.
    shift = tl.where(counted, -most * LOG2_E - tl.log2(total), -float("inf"))
    for n in tl.static_range(PARTS):
        column = n * BLOCK + at
        slope = shares[n] * scale if CAP == 0.0 else tl.exp2(parts[n] * LOG2_E + shift)
        slope = tl.where(column == label, slope - 1.0, slope)
        if CAP != 0.0:
            slope = slope * slope_of_cap(parts[n], CAP)
            if (n + 1) * BLOCK > CLASSES:  # the logit of padding is -inf
                slope = tl.where(column < CLASSES, slope, 0.0)
        if (n + 1) * BLOCK <= COLUMNS:
            tl.store(logits + column, slope.to(logits.dtype.element_ty))
        else:
            tl.store(logits + column, slope.to(logits.dtype.element_ty), mask=column < COLUMNS)


@triton.jit
def streamed(
    logits,
    targets,
    losses,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row, which is read twice; the arguments are those of `held`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * COLUMNS
    at = tl.arange(0, BLOCK)
    label = tl.load(targets + row).to(tl.int32)
    own = capped(tl.load(logits + tl.maximum(label, 0)).to(tl.float32), CAP)
    # Every lane has its own maximum and sum; that of the first block is finite.
    highest = tl.full((BLOCK,), -1e30, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for n in range(PARTS):
        column = n * BLOCK + at
        part = tl.load(logits + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        part = tl.where(column < CLASSES, capped(part, CAP), -float("inf"))
        higher = tl.maximum(highest, part)
        sums = sums * tl.exp2((highest - higher) * LOG2_E) + tl.exp2((part - higher) * LOG2_E)
        highest = higher
    most = tl.max(highest, 0)
    total = tl.sum(sums * tl.exp2((highest - most) * LOG2_E), 0)
    counted = label >= 0
    tl.store(losses + row, tl.where(counted, most + tl.log(total) - own, 0.0))
    scale = tl.where(counted, 1.0 / total, 0.0)
    for n in range(PARTS):
        column = n * BLOCK + at
        part = tl.load(logits + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        part = capped(part, CAP)
        slope = tl.exp2((part - most) * LOG2_E) * scale
        slope = tl.where(column == label, slope - 1.0, slope)
        if CAP != 0.0:
            slope = slope * slope_of_cap(part, CAP)
        slope = tl.where(column < CLASSES, slope, 0.0)
        tl.store(logits + column, slope.to(logits.dtype.element_ty), mask=column < COLUMNS)


def variant(
    columns: int, dtype: torch.dtype, cap: float = 0.0
) -> tuple[object, dict[str, int], int]:
    """The kernel for rows of a length, its sizes ``BLOCK`` and ``PARTS``, and its warps."""
    block = min(BLOCK, triton.next_power_of_2(columns))
    kernel = held if columns * dtype.itemsize <= (HELD_CAPPED if cap else HELD) else streamed
    return kernel, {"BLOCK": block, "PARTS": -(-columns // block)}, max(1, block // 256)


def cross_entropy_(logits: Tensor, targets: Tensor, classes: int, cap: float = 0.0) -> Tensor:
    """`gpt_dist.ops.cross_entropy.cross_entropy_`, for contiguous bf16 or fp32 logits."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return losses
    kernel, sizes, warps = variant(columns, logits.dtype, cap)
    with on(logits):
        kernel[(rows,)](  # type: ignore[index]
            logits,
            targets.contiguous(),
            losses,
            COLUMNS=columns,
            CLASSES=classes,
            CAP=cap,
            **sizes,
            num_warps=warps,
        )
    return losses


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on a tensor's device; Triton's interpreter takes tensors on the host."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
