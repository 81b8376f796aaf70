"""Operations of one decoding step: a row is one token of one sequence, in its slot of the cache."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops.registry import register_in_place

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(value: int) -> int:
    """A number of 64 bits as int64 holds it."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, which wraps alike."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position), float64; any order, any device, no state."""
    z = _mix(_mix(seeds + signed(_GOLDEN)) + positions * signed(_GOLDEN))
    return ((z >> 32) & 0xFFFFFFFF).double() * 2.0**-32


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
    rows = len(logits)
    ids, positions, generated, active = (row[:rows] for row in inputs)
    x = logits[:, :classes].float()
    biased, penalised, early = ((flags[:rows, None] & bit) != 0 for bit in (1, 2, 4))
    x = torch.where(biased, x + bias[:rows], x)
    repetition, presence, frequency = scales[:rows, 3:, None].unbind(1)
    times = count[:rows]
    seen = (times > 0) | (prompt[:rows] != 0)
    y = torch.where(seen, torch.where(x < 0, x * repetition, x / repetition), x)
    x = torch.where(penalised, y - frequency * times - presence * (times > 0), x)
    early = early & (stop[:rows] != 0) & (generated < numbers[:rows, 2])[:, None]
    x = x.masked_fill(early, -torch.inf)

    temperature, top_p, log_min_p = scales[:rows, :3, None].unbind(1)
    ordered = x.sort(dim=1, descending=True).values
    most, top_k = ordered[:, :1], numbers[:rows, :1]
    kth = ordered.gather(1, top_k - 1)
    mass = (
        ((ordered - most) / temperature)
        .exp()
        .where(ordered >= kth, 0)
        .cumsum(1, dtype=torch.float64)
    )
    # Kept while the tokens before have less than top_p of the mass.
    least = (mass < top_p * mass[:, -1:]).sum(1, keepdim=True).clamp(max=classes - 1)
    threshold = torch.where(top_p < 1, torch.maximum(kth, ordered.gather(1, least)), kth)
    threshold = torch.maximum(threshold, most + temperature * log_min_p)
    mass = ((x - most) / temperature).exp().where(x >= threshold, 0).cumsum(1, dtype=torch.float64)
    target = uniform(numbers[:rows, 1], positions + dropped[:rows] + 1)[:, None] * mass[:, -1:]
    drawn = torch.searchsorted(mass, target, right=True)[:, 0].clamp(max=classes - 1)
    chosen = torch.where(top_k[:, 0] == 1, x.argmax(1), drawn)

    tokens[:rows] = chosen
    counted = (penalised[:, 0] & (active != 0)).to(count.dtype)
    count[:rows].scatter_add_(1, chosen[:, None], counted[:, None])
    ids.copy_(torch.where(active != 0, chosen, ids))
    inputs[1:3, :rows] += active


def _triton(module: str, name: str) -> Callable[..., Any]:
    """An implementation in ``ops/triton``, which is imported when it is first called."""

    def implementation(*arguments: Any) -> Any:
        return getattr(import_module(f"gpt_dist.ops.triton.{module}"), name)(*arguments)

    return implementation


_decode_attention = register_in_place(
    "decode_attention_(Tensor qkv, Tensor(a!) cache, Tensor positions, Tensor active, int n_head)"
    " -> Tensor",
    _attend,
    fake=lambda qkv, cache, positions, active, n_head: qkv.new_empty(
        len(qkv), n_head * cache.shape[4]
    ),
    cuda=_triton("decode", "attention_"),
)
_add_norm = register_in_place(
    "add_norm_(Tensor(a!) stream, Tensor? branch, Tensor? weight, Tensor? bias, float eps,"
    " bool rms, bool keep, ScalarType dtype) -> Tensor",
    _normalise,
    fake=lambda stream, branch, weight, bias, eps, rms, keep, dtype: torch.empty_like(
        stream, dtype=dtype
    ),
    cuda=_triton("decode", "add_norm_"),
)
_sample = register_in_place(
    "sample_(Tensor logits, int classes, Tensor scales, Tensor numbers, Tensor bias,"
    " Tensor(a!) count, Tensor prompt, Tensor stop, Tensor flags, Tensor(b!) inputs,"
    " Tensor dropped, Tensor(c!) scores, Tensor(d!) tokens) -> ()",
    _choose,
    fake=lambda *arguments: None,
    cuda=_triton("sampling", "sample_"),
)
