"""Operations of one decoding step: a row is one token of one sequence, in its slot of the cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops.registry import register_in_place

SAMPLING_BLOCK = 4096
"""Columns that a program of the sampling kernel handles together."""


def scratch_width(classes: int) -> int:
    """Columns of the scratch tensor that `sample` needs."""
    return -(-classes // SAMPLING_BLOCK) * SAMPLING_BLOCK


def decode_attention(
    qkv: Tensor, cache: Tensor, positions: Tensor, active: Tensor, n_head: int
) -> Tensor:
    """Cache the keys and values of active rows, and attend over each row's live length.

    Args:
        qkv: (R, (H + 2 * K) * D) queries, keys and values side by side.
        cache: (2, at least R, K, T, D) keys and values of one layer; row r has slot r.
        positions: (R,) int64, where a row's key goes; those before are cached.
        active: (R,) int64; where it is 0 nothing is cached, and the result is of no use.
        n_head: H.

    Returns:
        (R, H * D) in the dtype of ``qkv``.
    """
    mixed: Tensor = _decode_attention(qkv, cache, positions, active, n_head)
    return mixed


def add_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    rms: bool,
    keep: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Add a branch to the residual stream in place, and normalise the sum.

    Args:
        stream: (R, C) fp32.
        branch: (R, C); None adds nothing.
        weight: (C,) fp32, as ``bias``.
        eps: added to the variance.
        rms: divide by the root of the mean square, and do not subtract the mean.
        keep: the norm becomes the stream (post-norm).
        dtype: of the result.

    Returns:
        (R, C), the norm of the sum.
    """
    y: Tensor = _add_norm(stream, branch, weight, bias, eps, rms, keep, dtype)
    return y


def sample(
    logits: Tensor, classes: int, scales: Tensor, numbers: Tensor, tables: list[Tensor],
    flags: Tensor, inputs: Tensor, dropped: Tensor, scores: Tensor, tokens: Tensor,
) -> None:  # fmt: skip
    """Choose the token of every row, and make those of active rows the next step's inputs.

    `gpt_dist.inference.sampling` describes the processors and the draw; the arguments are those of
    the kernel in ``triton/sampling.py``.

    Args:
        logits: (R, P) fp32.
        classes: V, columns that are not padding.
        scales: (S, 6) fp32.
        numbers: (S, 3) int64.
        tables: bias fp32, count int32, prompt int8 and stop int8, (S, V) each.
        flags: (S,) int32: 1 bias, 2 penalties, 4 stop tokens.
        inputs: (4, S) int64: tokens, positions, generated and active; overwritten.
        dropped: (S,) int64.
        scores: (S, `scratch_width` of V) fp32, scratch.
        tokens: (S,) int64, written.
    """
    _sample(logits, classes, scales, numbers, *tables, flags, inputs, dropped, scores, tokens)


def _attend(qkv: Tensor, cache: Tensor, positions: Tensor, active: Tensor, n_head: int) -> Tensor:
    rows, kv_heads, size = len(qkv), cache.shape[2], cache.shape[4]
    heads = qkv.view(rows, -1, size)
    query, key, value = heads.split((n_head, kv_heads, kv_heads), dim=1)
    index = positions[:, None, None, None].expand(rows, kv_heads, 1, size)
    here = active[:, None, None, None] != 0
    for stored, new in zip(cache, (key, value), strict=True):
        old = stored[:rows].gather(2, index)
        stored[:rows].scatter_(2, index, torch.where(here, new[:, :, None].to(old.dtype), old))
    mask = torch.arange(cache.shape[3], device=qkv.device)[None, :] <= positions[:, None]
    mixed = F.scaled_dot_product_attention(
        query[:, :, None].to(cache.dtype),
        cache[0, :rows],
        cache[1, :rows],
        mask[:, None, None],
        enable_gqa=kv_heads != n_head,
    )
    return mixed.flatten(1).to(qkv.dtype)


def _normalise(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    keep: bool,
    dtype: torch.dtype,
) -> Tensor:
    if branch is not None:
        stream += branch
    if rms:
        y = F.rms_norm(stream, stream.shape[-1:], weight, eps)
    else:
        y = F.layer_norm(stream, stream.shape[-1:], weight, bias, eps)
    if keep:
        stream.copy_(y)
    return y.to(dtype, copy=True)


def _choose(
    logits: Tensor, classes: int, scales: Tensor, numbers: Tensor, bias: Tensor, count: Tensor,
    prompt: Tensor, stop: Tensor, flags: Tensor, inputs: Tensor, dropped: Tensor, scores: Tensor,
    tokens: Tensor,
) -> None:  # fmt: skip
    raise NotImplementedError("on a CPU the decoder samples with gpt_dist.inference.sampling")


def _attend_cuda(
    qkv: Tensor, cache: Tensor, positions: Tensor, active: Tensor, n_head: int
) -> Tensor:
    from gpt_dist.ops.triton import decode

    return decode.attention_(qkv, cache, positions, active, n_head)


def _normalise_cuda(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    keep: bool,
    dtype: torch.dtype,
) -> Tensor:
    from gpt_dist.ops.triton import decode

    return decode.add_norm_(stream, branch, weight, bias, eps, rms, keep, dtype)


def _choose_cuda(
    logits: Tensor, classes: int, scales: Tensor, numbers: Tensor, bias: Tensor, count: Tensor,
    prompt: Tensor, stop: Tensor, flags: Tensor, inputs: Tensor, dropped: Tensor, scores: Tensor,
    tokens: Tensor,
) -> None:  # fmt: skip
    from gpt_dist.ops.triton import sampling

    tables = [bias, count, prompt, stop]
    sampling.sample_(
        logits, classes, scales, numbers, tables, flags, inputs, dropped, scores, tokens
    )


_decode_attention = register_in_place(
    "decode_attention_(Tensor qkv, Tensor(a!) cache, Tensor positions, Tensor active, int n_head)"
    " -> Tensor",
    _attend,
    fake=lambda qkv, cache, positions, active, n_head: qkv.new_empty(
        len(qkv), n_head * cache.shape[4]
    ),
    cuda=_attend_cuda,
)
_add_norm = register_in_place(
    "add_norm_(Tensor(a!) stream, Tensor? branch, Tensor? weight, Tensor? bias, float eps,"
    " bool rms, bool keep, ScalarType dtype) -> Tensor",
    _normalise,
    fake=lambda stream, branch, weight, bias, eps, rms, keep, dtype: torch.empty_like(
        stream, dtype=dtype
    ),
    cuda=_normalise_cuda,
)
_sample = register_in_place(
    "sample_(Tensor logits, int classes, Tensor scales, Tensor numbers, Tensor bias,"
    " Tensor(a!) count, Tensor prompt, Tensor stop, Tensor flags, Tensor(b!) inputs,"
    " Tensor dropped, Tensor(c!) scores, Tensor(d!) tokens) -> ()",
    _choose,
    fake=lambda *arguments: None,
    cuda=_choose_cuda,
)
