"""Linear layers and embeddings whose backward pass can add to ``main_grad`` by itself.

Autograd makes each micro-batch's gradient of a matrix a new tensor and then adds it to the sum.
Within `fused_accumulation` the backward pass adds the product to the sum directly: less memory
and fewer passes over it. Megatron-LM calls this gradient accumulation fusion and the fp32 sum
``main_grad``; parameters here are fp32 themselves, so their ``main_grad`` is ``.grad``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops import native_training as native
from gpt_dist.ops.activation import activate, activate_backward
from gpt_dist.ops.gelu import gelu
from gpt_dist.ops.registry import concrete, register_in_place
from gpt_dist.ops.relu2 import relu2

ROWS = 8192
"""Most rows of a matrix whose gradient is computed at once; bounds the product's memory."""

_fused = False


@contextmanager
def fused_accumulation(enabled: bool = True) -> Iterator[None]:
    """Within, forward passes record that their backward passes add to ``main_grad`` themselves.

    Hooks on these parameters do not run, so this is not for passes whose gradients a reducer
    waits for. The output head's gradient is added while the loss is computed: only the loss
    itself can be differentiated, not a multiple of it.
    """
    global _fused  # noqa: PLW0603  (a mode like torch.no_grad, switched by one engine a process)
    before, _fused = _fused, enabled
    try:
        yield
    finally:
        _fused = before


def fuses(weight: Tensor) -> bool:
    """Whether the pass being recorded adds this parameter's gradient to its ``main_grad``."""
    # What is being compiled must not depend on the mode: one graph serves every micro-batch.
    return concrete(weight) and _fused and weight.requires_grad and torch.is_grad_enabled()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, as `torch.nn.functional.linear`.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,).

    Returns:
        (..., O) in autocast's dtype where it is on.
    """
    if not fuses(weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(_cast(x), weight, bias, "")  # type: ignore[no-untyped-call]
    return y


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(gelu(x), weight, bias)``; a fused backward pass recomputes the GELU's output."""
    if not fuses(weight) or not native.takes(x):
        return linear(gelu(x), weight, bias)
    y: Tensor = _Linear.apply(_cast(x), weight, bias, "gelu")  # type: ignore[no-untyped-call]
    return y


def relu2_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(relu2(x), weight, bias)``; a fused backward pass recomputes the squares."""
    if not fuses(weight) or not native.takes(x):
        return linear(relu2(x), weight, bias)
    y: Tensor = _Linear.apply(_cast(x), weight, bias, "relu2")  # type: ignore[no-untyped-call]
    return y


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` (N, C) for int64 ``ids`` (...): (..., C)."""
    # On a GPU the sum of rows would depend on the order in which they come.
    if not fuses(weight) or weight.device.type != "cpu":
        return F.embedding(ids, weight)
    rows: Tensor = _Embedding.apply(ids, weight)  # type: ignore[no-untyped-call]
    return rows


@torch.no_grad()
def add_to_main_grad(parameter: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left.T @ right`` to a parameter's ``main_grad``.

    Args:
        parameter: (M, N), fp32.
        left: (K, M), as ``right`` (K, N).
    """
    fresh = parameter.grad is None
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    add_product_(parameter.grad, left, right, fresh)


def add_product_(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """Add ``left.T @ right`` to ``total`` in place, or overwrite it where it is ``fresh``.

    Args:
        total: (M, N), fp32 or the dtype of the others.
        left: (K, M), as ``right`` (K, N).
        fresh: whether ``total`` holds nothing yet.
    """
    _add_product_(total, left, right, fresh)


def _cast(x: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _reference(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    for start in range(0, len(total), ROWS):
        rows = slice(start, start + ROWS)
        if left.dtype == total.dtype:
            total[rows].addmm_(left[:, rows].t(), right, beta=0 if fresh else 1)
            continue
        product = left[:, rows].t() @ right
        if fresh:
            total[rows] = product
        elif native.takes(product) and total.is_contiguous():
            native.run("add", product.dtype, total[rows], product, total[rows], product.numel())
        else:
            total[rows] += product


def _cuda(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right, beta=0 if fresh else 1)
    elif fresh:
        torch.mm(left.t(), right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)


_add_product_ = register_in_place(
    "add_product_(Tensor(a!) total, Tensor left, Tensor right, bool fresh) -> ()",
    _reference,
    fake=lambda total, left, right, fresh: None,
    cuda=_cuda,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, of: str) -> Tensor:
        ctx.save_for_backward(x)
        # Not a saved tensor: recomputation (activation checkpointing) would hand out another one.
        ctx.weight = weight
        ctx.bias = None if bias is None else bias.dtype
        ctx.of = of  # an activation, or "": of the input itself
        if of:
            x = activate(of, x)
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_x = grad @ ctx.weight.to(grad.dtype)
        if ctx.of:
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            grad_x = activate_backward(ctx.of, x, grad_x, y)
            x = y
        flat = grad.flatten(0, -2)
        add_to_main_grad(ctx.weight, flat, x.flatten(0, -2))
        grad_bias = None if ctx.bias is None else flat.sum(0).to(ctx.bias)
        return grad_x, None, grad_bias, None


class _Embedding(torch.autograd.Function):
    """Adds to the rows that were looked up, and to no other."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        rows = grad_outputs[0].flatten(0, -2).to(ctx.weight.dtype)
        ctx.weight.grad.index_add_(0, ids.flatten(), rows)
        return None, None
