"""Causal attention; for training on a CPU a faster one than PyTorch's, with dropout.

PyTorch's fused attention has no dropout on a CPU: ``F.scaled_dot_product_attention`` falls back to
whole (B, H, T, T) matrices of scores and probabilities; and without dropout its bf16 backward pass
is slow. Here scores exist for a few sequences and ``QUERIES`` queries at a time, so that they stay
in the processor's cache, and the backward pass computes them again from queries and keys
(FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops import training_kernels
from gpt_dist.ops.dropout import drop_, dropped_share, keep_mask

QUERIES = 128
"""Queries of one block; keys behind a block's last query are never looked at."""

BLOCK_SCORES = 1 << 20
"""Scores of one block, over the sequences and heads taken together."""


def self_attention(qkv: Tensor, heads: int, dropout: float = 0.0) -> Tensor:
    """``attention`` of queries, keys and values that lie side by side.

    Args:
        qkv: (B, T, 3 * H * D).
        heads: H.
        dropout: as in ``attention``.

    Returns:
        (B, T, H * D).
    """
    batch, time, width = qkv.shape
    depth = width // 3 // heads
    if not dropout and depth % 16 == 0 and training_kernels.usable(qkv):
        mixed: Tensor = training_kernels.Attention.apply(qkv, heads)  # type: ignore[no-untyped-call]
        return mixed
    query, key, value = qkv.view(batch, time, 3, heads, depth).permute(2, 0, 3, 1, 4)
    mixed = attention(query, key, value, dropout)
    return mixed.transpose(1, 2).reshape(batch, time, width // 3)


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal scaled dot-product attention.

    Args:
        query: (B, H, T, D); ``key`` and ``value`` alike.
        dropout: share of the attention weights that are set to zero; on a CPU it is rounded to a
            multiple of 1/256, and what is kept is scaled for exactly that.

    Returns:
        (B, H, T, D).
    """
    if dropout and query.device.type == "cpu" and not torch.compiler.is_compiling():
        mixed: Tensor = _cpu_attention(query, key, value, dropout)
        return mixed
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    dropped = dropped_share(dropout) if dropout else 0
    seed = int(torch.randint(2**63 - 1, ())) if dropped else 0
    mixed: Tensor = _Attention.apply(query, key, value, dropped, seed)  # type: ignore[no-untyped-call]
    return mixed


class _Blocks:
    """Walks the scores block by block, the same way and with the same dropout each time."""

    def __init__(self, query: Tensor, key: Tensor, dropped: int, seed: int) -> None:
        self.dropped = dropped
        # Scores rounded to bf16 would cost up to four times the error of PyTorch's fused kernel.
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


class _Attention(torch.autograd.Function):
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
            # Both dropout's factor and the scores' scale act on whole sums: once, at the end.
            for total, factor in ((grad_q, walk.scale), (grad_k, walk.scale), (grad_v, 1.0)):
                if factor != walk.keep:
                    total.mul_(factor / walk.keep)
        return (*grads, None, None)
