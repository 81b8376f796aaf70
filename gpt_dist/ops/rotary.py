"""Rotary positions (RoPE, arXiv:2104.09864), and RMSNorm of what was rotated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt_dist.ops import native_training as native
from gpt_dist.ops.registry import register


def rotary(
    qkv: Tensor, positions: Tensor, n_head: int, n_kv_head: int, base: float, eps: float
) -> Tensor:
    """Rotate queries and keys by their position and normalise each head of them.

    Channel i of a head and channel i + D / 2 turn together, by -position / base^(2 i / D)
    radians, as in transformers' NanoChat.

    Args:
        qkv: (..., T, (H + 2 * K) * D) queries, keys and values side by side.
        positions: (T,) int64.
        n_head: H, heads of queries.
        n_kv_head: K, heads of keys, and of values, which stay as they are.
        base: of the wavelengths.
        eps: added to the mean of a head's squares.

    Returns:
        A tensor like ``qkv``.
    """
    turned: Tensor = _rotary(qkv, positions, n_head, n_kv_head, base, eps)
    return turned


def angles(positions: Tensor, size: int, base: float) -> Tensor:
    """(T, D / 2) angles in radians, fp32, for positions (T,) and heads of size D."""
    even = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    return positions[:, None].float() * (1 / base ** (even / size))


def _reference(
    qkv: Tensor, positions: Tensor, n_head: int, n_kv_head: int, base: float, eps: float
) -> Tensor:
    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))
    values = heads[..., n_head + n_kv_head :, :]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    first, second = heads[..., : n_head + n_kv_head, :].to(wide).chunk(2, dim=-1)
    angle = angles(positions, heads.shape[-1], base).to(wide)[:, None]  # the same for all heads
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
    scale = torch.rsqrt(turned.square().mean(-1, keepdim=True) + eps)
    return torch.cat([(turned * scale).to(qkv.dtype), values], -2).flatten(-2)


def _cpu(
    qkv: Tensor, positions: Tensor, n_head: int, n_kv_head: int, base: float, eps: float
) -> Tensor:
    if not native.takes(qkv):
        return _reference(qkv, positions, n_head, n_kv_head, base, eps)
    heads, turned = n_head + 2 * n_kv_head, n_head + n_kv_head
    angle = angles(positions, qkv.shape[-1] // heads, base)
    table = torch.cat([angle.cos(), angle.sin()], -1)
    y: Tensor = _Rotary.apply(qkv, table, heads, turned, eps)  # type: ignore[no-untyped-call]
    return y


class _Rotary(torch.autograd.Function):
    """Keeps its output for the backward pass, which attention keeps anyway."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, table: Tensor, heads: int, turned: int, eps: float
    ) -> Tensor:
        qkv = qkv.contiguous()
        tokens, size = table.shape
        rows = qkv.numel() // (heads * size)
        ctx.shape = rows, tokens, heads, turned, size
        y, scales = torch.empty_like(qkv), torch.empty(rows, turned)
        native.run("rotary", qkv.dtype, qkv, table, *ctx.shape, eps, y, scales)
        ctx.save_for_backward(y, table, scales)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        y, table, scales = ctx.saved_tensors
        grad, grad_qkv = grad_outputs[0].contiguous(), torch.empty_like(y)
        native.run("rotary_backward", y.dtype, y, table, scales, grad, *ctx.shape, grad_qkv)
        return grad_qkv, None, None, None, None


_rotary = register(
    "rotary(Tensor qkv, Tensor positions, int n_head, int n_kv_head, float base, float eps)"
    " -> Tensor",
    _reference,
    cpu=_cpu,
)
