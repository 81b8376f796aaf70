"""Pieces of the training step in ``native/training.cpp``: attention, layer norm, GELU and others.

For bf16 on CPUs with AVX-512 BF16. Where they cannot be built, or with ``GPT_DIST_KERNELS=0``,
training runs on PyTorch's own, which is slower; the arithmetic is the same but for rounding.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gpt_dist.errors import GptDistError
from gpt_dist.ops import build

_log = logging.getLogger(__name__)

_ARGUMENTS = {
    "attention": [c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_int],
    "attention_backward": [
        c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int,
    ],
    "layer_norm": [
        c_void_p, c_void_p, c_void_p, c_int, c_int, c_float, c_void_p, c_void_p, c_int,
    ],
    "layer_norm_backward": [
        c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_int,
    ],
    "gelu": [c_void_p, c_void_p, c_int64, c_int],
    "gelu_backward": [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int],
    "cross_entropy": [c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_int],
    "add": [c_void_p, c_void_p, c_void_p, c_int64, c_int],
}  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had; the reason is logged once."""
    if build.disabled():
        return None
    try:
        lib = build.load("training.cpp")
    except GptDistError as error:
        _log.warning("training without the CPU kernels, which is slower: %s", error)
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    return lib


def usable(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels take this tensor, which must be of a dtype."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == dtype
        and library() is not None
    )


def run(name: str, *arguments: Any) -> None:
    """Call a kernel; tensors must be contiguous, None is a null pointer."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(library(), name)(*values, torch.get_num_threads())


class Attention(torch.autograd.Function):
    """Causal self-attention: (B, T, 3 * H * D) → (B, T, H * D), D a multiple of 16."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        batch, time, width = qkv.shape
        qkv = qkv.contiguous()
        out = qkv.new_empty(batch, time, width // 3)
        log_sums = torch.empty(batch, heads, time)
        ctx.shape = batch, time, heads, width // 3 // heads
        run("attention", qkv, *ctx.shape, out, log_sums)
        ctx.save_for_backward(qkv, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        qkv, out, log_sums = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        upstream = grad_outputs[0].contiguous()
        run("attention_backward", qkv, *ctx.shape, out, log_sums, upstream, grad)
        return grad, None


class LayerNorm(torch.autograd.Function):
    """Layer norm of the last dimension: fp32 (..., C) → bf16 (..., C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        y = torch.empty_like(x, dtype=torch.bfloat16)
        stats = torch.empty(rows, 2)
        run("layer_norm", x, weight, bias, rows, width, eps, y, stats)
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
        run("layer_norm_backward", x, weight, stats, upstream, rows, width, grad_x, total)
        grad_weight, grad_bias = total
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


class Gelu(torch.autograd.Function):
    """tanh GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gelu_backward(x, grad_outputs[0])


class Add(torch.autograd.Function):
    """fp32 + bf16 of the same shape → fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        total = torch.empty_like(x)
        run("add", x, y, total, x.numel())
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return grad_outputs[0], grad_outputs[0].bfloat16()


def gelu(x: Tensor) -> Tensor:
    """tanh GELU, elementwise."""
    x = x.contiguous()
    y = torch.empty_like(x)
    run("gelu", x, y, x.numel())
    return y


def gelu_backward(x: Tensor, grad: Tensor, y: Tensor | None = None) -> Tensor:
    """Gradients of the outputs → those of the inputs; the outputs go to ``y`` once more."""
    x = x.contiguous()
    grad_x = torch.empty_like(x)
    run("gelu_backward", x, grad.contiguous(), grad_x, y, x.numel())
    return grad_x


def cross_entropy_(logits: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Turn logits (N, P) into the gradients of their cross-entropies, in place.

    Returns:
        (N,) cross-entropies in nats, fp32; zero where the target is negative.
    """
    losses = torch.empty(len(logits))
    rows, columns = logits.shape
    run("cross_entropy", logits, targets.contiguous(), rows, columns, classes, losses)
    return losses
