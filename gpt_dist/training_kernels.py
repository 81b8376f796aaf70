"""Attention, GELU and cross-entropy of the training step, in ``native/training.cpp``.

For bf16 on CPUs with AVX-512 BF16. Where they cannot be built, or with ``GPT_DIST_KERNELS=0``,
training runs on PyTorch's own, which is slower; the arithmetic is the same but for rounding.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gpt_dist import kernels

_log = logging.getLogger(__name__)

_ARGUMENTS = {
    "attention": [c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_int],
    "attention_backward": [
        c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int,
    ],
    "gelu": [c_void_p, c_void_p, c_int64, c_int],
    "gelu_backward": [c_void_p, c_void_p, c_void_p, c_int64, c_int],
    "cross_entropy": [c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_int],
    "accumulate": [c_void_p, c_void_p, c_int64, c_int],
}  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had; the reason is logged once."""
    if os.environ.get("GPT_DIST_KERNELS") == "0":
        return None
    reason = kernels.unavailable()
    if not reason:
        try:
            lib = ctypes.CDLL(str(kernels.build("training.cpp")))
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"building them failed: {getattr(error, 'stderr', None) or error}"
        else:
            for name, arguments in _ARGUMENTS.items():
                function = getattr(lib, name)
                function.argtypes, function.restype = arguments, None
            return lib
    _log.warning("training without the CPU kernels, which is slower: %s", reason.splitlines()[0])
    return None


def usable(x: Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
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


class Gelu(torch.autograd.Function):
    """tanh GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        run("gelu", x, y, x.numel())
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        grad = torch.empty_like(x)
        run("gelu_backward", x, grad_outputs[0].contiguous(), grad, x.numel())
        return grad


def cross_entropy_(logits: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Turn logits (N, P) into the gradients of their cross-entropies, in place.

    Returns:
        (N,) cross-entropies in nats, fp32; zero where the target is negative.
    """
    losses = torch.empty(len(logits))
    rows, columns = logits.shape
    run("cross_entropy", logits, targets.contiguous(), rows, columns, classes, losses)
    return losses
