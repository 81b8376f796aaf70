"""Causal self-attention for training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops import native_training as native
from gpt_dist.ops.dropout import drop_, dropped_share, keep_mask
from gpt_dist.ops.registry import concrete, register

QUERIES = 128
"""Queries of one block; keys after its last query are skipped."""

BLOCK_SCORES = 1 << 20
"""Most scores of one block, over its sequences and heads."""


def attention(
    qkv: Tensor, n_head: int, dropout: float = 0.0, n_kv_head: int | None = None
) -> Tensor:
    """Causal scaled dot-product self-attention.

    Args:
        qkv: (B, T, (H + 2 * K) * D) queries, keys and values side by side.
        n_head: H.
        dropout: share of the attention weights set to zero; on a CPU a multiple of 1/256.
        n_kv_head: K, which divides H; each head of keys and values is for H / K heads of queries
            that stand side by side. By default H.

    Returns:
        (B, T, H * D).
    """
    if n_kv_head is not None and n_kv_head != n_head:
        qkv = repeat_heads(qkv, n_head, n_kv_head)
    mixed: Tensor = _attention(qkv, n_head, dropout)
    return mixed


def repeat_heads(qkv: Tensor, n_head: int, n_kv_head: int) -> Tensor:
    """(B, T, (H + 2 * K) * D) → (B, T, 3 * H * D): keys and values for each head."""
    heads = qkv.unflatten(2, (n_head + 2 * n_kv_head, -1))
    shared = heads[:, :, n_head:].repeat_interleave(n_head // n_kv_head, dim=2)
    return torch.cat([heads[:, :, :n_head], shared], 2).flatten(2)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 * H * D) → queries, keys and values, (B, H, T, D) each."""
    batch, time, width = qkv.shape
    parts = qkv.view(batch, time, 3, n_head, width // 3 // n_head).permute(2, 0, 3, 1, 4)
    query, key, value = parts
    return query, key, value


def join_heads(mixed: Tensor) -> Tensor:
    """(B, H, T, D) → (B, T, H * D)."""
    return mixed.transpose(1, 2).flatten(2)


def _reference(qkv: Tensor, n_head: int, dropout: float) -> Tensor:
    query, key, value = split_heads(qkv, n_head)
    return join_heads(
        F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
    )


def _cpu(qkv: Tensor, n_head: int, dropout: float) -> Tensor:
    if dropout and concrete(qkv):
        return join_heads(blocked_attention(*split_heads(qkv, n_head), dropout))
    depth = qkv.shape[2] // 3 // n_head
    if not dropout and depth % 16 == 0 and native.takes(qkv):
        mixed: Tensor = _NativeAttention.apply(qkv, n_head)  # type: ignore[no-untyped-call]
        return mixed
    return _reference(qkv, n_head, dropout)


class _NativeAttention(torch.autograd.Function):
    """D a multiple of 16, without dropout."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        batch, time, width = qkv.shape
        qkv = qkv.contiguous()
        out = qkv.new_empty(batch, time, width // 3)
        log_sums = torch.empty(batch, n_head, time)
        ctx.shape = batch, time, n_head, width // 3 // n_head
        native.run("attention", qkv.dtype, qkv, *ctx.shape, out, log_sums)
        ctx.save_for_backward(qkv, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        qkv, out, log_sums = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        upstream = grad_outputs[0].contiguous()
        native.run("attention_backward", qkv.dtype, qkv, *ctx.shape, out, log_sums, upstream, grad)
        return grad, None


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Causal attention with dropout on a CPU.

    PyTorch's fused kernel has no dropout there and would store whole (B, H, T, T) matrices. Here
    scores exist for ``QUERIES`` queries of a few sequences at a time, so that they stay in the
    cache, and the backward pass computes them again (FlashAttention, arXiv:2205.14135).

    Args:
        query: (B, H, T, D), as ``key`` and ``value``.
        dropout: share of the attention weights set to zero, a multiple of 1/256.

    Returns:
        (B, H, T, D).
    """
    dropped, seed = dropped_share(dropout), int(torch.randint(2**63 - 1, ()))
    mixed: Tensor = _BlockedAttention.apply(query, key, value, dropped, seed)  # type: ignore[no-untyped-call]
    return mixed


class _Blocks:
    """Iterates over blocks of scores; the same order and dropout in both passes."""

    def __init__(self, query: Tensor, key: Tensor, dropped: int, seed: int) -> None:
        self.dropped = dropped
        # bf16 scores would have up to four times the error of PyTorch's fused kernel.
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.batch, self.heads, self.time, self.depth = query.shape
        self.scale = self.depth**-0.5
        self.keep = 1 - dropped / 256
        self.generator = torch.Generator().manual_seed(seed)
        size = min(QUERIES, self.time)
        self.future = torch.full((size, size), float("-inf"), dtype=self.wide).triu(1)
        self.sequences = max(1, BLOCK_SCORES // (self.heads * size * self.time))

    def flat(self, tensor: Tensor, rows: slice) -> Tensor:
        """(sequences * H, T, D) of some sequences."""
        return tensor[rows].reshape(-1, self.time, self.depth)

    def rows(self) -> Iterator[slice]:
        for start in range(0, self.batch, self.sequences):
            yield slice(start, min(start + self.sequences, self.batch))

    def blocks(
        self, query: Tensor, key: Tensor
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Queries, keys, probabilities and the mask of which are kept (None: all)."""
        dtype, query, key = query.dtype, query.to(self.wide) * self.scale, key.to(self.wide)
        for start in range(0, self.time, QUERIES):
            end = min(start + QUERIES, self.time)
            here, seen = slice(start, end), slice(0, end)
            scores = query[:, here] @ key[:, seen].transpose(1, 2)
            scores[:, :, start:end].add_(self.future[: end - start, : end - start])
            kept = None
            if self.dropped:
                kept = keep_mask(tuple(scores.shape), self.dropped, self.generator)
            yield here, seen, scores.softmax(dim=-1).to(dtype), kept


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropped: int, seed: int
    ) -> Tensor:
        walk = _Blocks(query, key, dropped, seed)
        mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
        with torch.autocast("cpu", enabled=False):
            for rows in walk.rows():
                q, k, v = (walk.flat(tensor, rows) for tensor in (query, key, value))
                out = mixed[rows].view(-1, walk.time, walk.depth)
                for here, seen, weights, kept in walk.blocks(q, k):
                    out[:, here] = drop_(weights, kept) @ v[:, seen]
                if walk.dropped:
                    out.div_(walk.keep)
        ctx.save_for_backward(query, key, value)
        ctx.dropped, ctx.seed = dropped, seed
        return mixed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        walk = _Blocks(query, key, ctx.dropped, ctx.seed)
        grads = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3)]
        for rows in walk.rows():
            q, k, v, grad = (
                walk.flat(tensor, rows) for tensor in (query, key, value, grad_outputs[0])
            )
            grad_q, grad_k, grad_v = (
                g[rows].view(-1, walk.time, walk.depth).zero_() for g in grads
            )
            for here, seen, weights, kept in walk.blocks(q, k):
                slopes = drop_(grad[:, here] @ v[:, seen].transpose(1, 2), kept)
                slopes = torch._softmax_backward_data(slopes, weights, -1, slopes.dtype)
                grad_v[:, seen] += drop_(weights, kept).transpose(1, 2) @ grad[:, here]
                grad_q[:, here] = slopes @ k[:, seen]
                grad_k[:, seen] += slopes.transpose(1, 2) @ q[:, here]
            # Dropout's factor and the scores' scale are constants: apply them once, to the sums.
            for total, factor in ((grad_q, walk.scale), (grad_k, walk.scale), (grad_v, 1.0)):
                if factor != walk.keep:
                    total.mul_(factor / walk.keep)
        return (*grads, None, None)


_attention = register(
    "attention(Tensor qkv, int n_head, float dropout) -> Tensor", _reference, cpu=_cpu
)
