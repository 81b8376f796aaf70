"""Layer norm and RMSNorm, whose output is in the dtype of the matrix product that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops import native_training as native
from gpt_dist.ops.registry import register


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last dimension.

    Args:
        x: (..., C).
        weight: (C,), as ``bias``.
        eps: added to the variance.

    Returns:
        (..., C) in autocast's dtype where it is on, else in the dtype of ``x``.
    """
    y: Tensor = _layer_norm(x, weight, bias, eps, _product_dtype(x))
    return y


def rms_norm(x: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """RMSNorm (arXiv:1910.07467) over the last dimension, without weights.

    Args:
        x: (..., C).
        eps: added to the mean of the squares.
        dtype: of the result; by default autocast's where it is on, else that of ``x``.

    Returns:
        (..., C).
    """
    y: Tensor = _rms_norm(x, eps, dtype or _product_dtype(x))
    return y


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _rms_reference(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(dtype)


def _rms_cpu(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if native.takes(x, torch.float32) and dtype in (torch.bfloat16, torch.float32):
        y: Tensor = _RMSNorm.apply(x, eps, dtype)  # type: ignore[no-untyped-call]
        return y
    return _rms_reference(x, eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """fp32 (..., C) → bf16 or fp32 (..., C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        y, scales = torch.empty_like(x, dtype=dtype), torch.empty(rows)
        native.run("rms_norm", dtype, x, rows, width, eps, y, scales)
        ctx.save_for_backward(x, scales)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, scales = ctx.saved_tensors
        grad, grad_x = grad_outputs[0].contiguous(), torch.empty_like(x)
        arguments = x, scales, grad, len(scales), x.shape[-1], grad_x
        native.run("rms_norm_backward", grad.dtype, *arguments)
        return grad_x, None, None


_rms_norm = register(
    "rms_norm(Tensor x, float eps, ScalarType dtype) -> Tensor", _rms_reference, cpu=_rms_cpu
)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    if native.takes(x, torch.float32) and dtype in (torch.bfloat16, torch.float32):
        y: Tensor = _LayerNorm.apply(x, weight, bias, eps, dtype)  # type: ignore[no-untyped-call]
        return y
    return _reference(x, weight, bias, eps, dtype)


class _LayerNorm(torch.autograd.Function):
    """fp32 (..., C) → bf16 or fp32 (..., C)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        y = torch.empty_like(x, dtype=dtype)
        stats = torch.empty(rows, 2)
        native.run("layer_norm", dtype, x, weight, bias, rows, width, eps, y, stats)
        ctx.save_for_backward(x, weight, stats)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, weight, stats = ctx.saved_tensors
        rows, width = len(stats), x.shape[-1]
        grad_x = torch.empty_like(x)
        total = torch.empty(2, width)
        upstream = grad_outputs[0].contiguous()
        arguments = x, weight, stats, upstream, rows, width, grad_x, total
        native.run("layer_norm_backward", upstream.dtype, *arguments)
        grad_weight, grad_bias = total
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


_layer_norm = register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor",
    _reference,
    cpu=_cpu,
)
