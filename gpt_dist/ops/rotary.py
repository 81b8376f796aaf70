"""Rotary positions (RoPE, arXiv:2104.09864), and RMSNorm of what was rotated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt_dist.ops import native_training as native
from gpt_dist.ops.registry import register


def rotations(positions: Tensor, size: int, base: float) -> Tensor:
    """Cosines and sines for `rotary`.

    Channel i of a head and channel i + D / 2 turn together, by -position / base^(2 i / D)
    radians, as in transformers' NanoChat.

    Args:
        positions: (T,) int64.
        size: D, channels of a head.
        base: of the wavelengths.

    Returns:
        (T, D) fp32: of each position D / 2 cosines, then D / 2 sines.
    """
    even = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, None].float() * (1 / base ** (even / size))
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotary(qkv: Tensor, turns: Tensor, n_head: int, n_kv_head: int, eps: float) -> Tensor:
    """Rotate queries and keys, and normalise each head of them.

    Args:
        qkv: (..., T, (H + 2 * K) * D) queries, keys and values side by side.
        turns: (T, D) from `rotations`.
        n_head: H, heads of queries.
        n_kv_head: K, heads of keys, and of values, which stay as they are.
        eps: added to the mean of a head's squares.

    Returns:
        A tensor like ``qkv``.
    """
    turned: Tensor = _rotary(qkv, turns, n_head, n_kv_head, eps)
    return turned


def _reference(qkv: Tensor, turns: Tensor, n_head: int, n_kv_head: int, eps: float) -> Tensor:
    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))
    values = heads[..., n_head + n_kv_head :, :]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    first, second = heads[..., : n_head + n_kv_head, :].to(wide).chunk(2, dim=-1)
    cos, sin = turns.to(wide)[:, None].chunk(2, dim=-1)  # the same for all heads
    turned = torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
    scale = torch.rsqrt(turned.square().mean(-1, keepdim=True) + eps)
    return torch.cat([(turned * scale).to(qkv.dtype), values], -2).flatten(-2)


def _cpu(qkv: Tensor, turns: Tensor, n_head: int, n_kv_head: int, eps: float) -> Tensor:
    if not native.takes(qkv):
        return _reference(qkv, turns, n_head, n_kv_head, eps)
    heads, turned = n_head + 2 * n_kv_head, n_head + n_kv_head
    y: Tensor = _Rotary.apply(qkv, turns, heads, turned, eps)  # type: ignore[no-untyped-call]
    return y


class _Rotary(torch.autograd.Function):
    """Keeps its output for the backward pass, which attention keeps anyway."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, turns: Tensor, heads: int, turned: int, eps: float
    ) -> Tensor:
        qkv, turns = qkv.contiguous(), turns.contiguous()
        tokens, size = turns.shape
        rows = qkv.numel() // (heads * size)
        ctx.shape = rows, tokens, heads, turned, size
        y, scales = torch.empty_like(qkv), torch.empty(rows, turned)
        native.run("rotary", qkv.dtype, qkv, turns, *ctx.shape, eps, y, scales)
        ctx.save_for_backward(y, turns, scales)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        y, turns, scales = ctx.saved_tensors
        grad, grad_qkv = grad_outputs[0].contiguous(), torch.empty_like(y)
        native.run("rotary_backward", y.dtype, y, turns, scales, grad, *ctx.shape, grad_qkv)
        return grad_qkv, None, None, None, None


_rotary = register(
    "rotary(Tensor qkv, Tensor turns, int n_head, int n_kv_head, float eps) -> Tensor",
    _reference,
    cpu=_cpu,
)
