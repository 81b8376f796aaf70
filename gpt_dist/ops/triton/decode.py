"""A decoding step's attention over the cache, and its residual additions with the norm after them.

A row is one token of one sequence. What a kernel reads is bounded by the row's own length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt_dist.ops.triton.cross_entropy import LOG2_E, on

TILE = 2048
"""Elements of keys that a program of attention handles together."""
OPTIONS = {"num_warps": 8} | ({} if torch.version.hip else {"maxnreg": 80})
"""Of attention: three programs fit a multiprocessor. Left to itself, the assembler takes 48 to 255
registers and spills some with one version of Triton or another."""
PROGRAMS = 264
"""Programs that keep a GPU busy: two for each multiprocessor of an H100."""


@triton.jit
def attention(
    qkv,
    keys,
    values,
    positions,
    active,
    out,
    partial,
    slot_stride,
    head_stride,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A part of the keys for one query of one row; the first part caches the row's own key.

    Args:
        qkv: (R, (HEADS + 2 * HEADS / GROUP) * SIZE) queries, keys and values side by side.
        keys: cache of this layer: slot, head, position, channel; as ``values``.
        positions: (R,) int64: of each row, and the number of keys that are cached.
        active: (R,) int64; where it is 0 nothing is cached, and the result is only the row's own.
        out: (R, HEADS * SIZE), written where ``SPLITS`` is 1.
        partial: (R, HEADS, SPLITS, WIDTH + 2) fp32 otherwise: sums of values, maximum, sum.
        slot_stride: elements from slot to slot in the cache.
        head_stride: elements from head to head there.
        scale: of the scores.
        HEADS: of queries.
        GROUP: heads of queries that share a head of keys.
        SIZE: of a head.
        WIDTH: ``SIZE``, rounded up to a power of two.
        SPLITS: parts.
        KEYS: keys of a block.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    shared = head // GROUP
    channel = tl.arange(0, WIDTH)
    inside = channel < SIZE
    qkv += row * (HEADS + 2 * (HEADS // GROUP)) * SIZE
    query = tl.load(qkv + head * SIZE + channel, mask=inside, other=0.0).to(tl.float32)
    query = query * scale * LOG2_E
    cache = row.to(tl.int64) * slot_stride + shared * head_stride
    position = tl.load(positions + row)
    here = tl.load(active + row)
    length = tl.where(here != 0, position, 0).to(tl.int32)
    most = tl.full((), -1e30, tl.float32)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((WIDTH,), tl.float32)
    if split == 0:
        own = qkv + (HEADS + shared) * SIZE + channel
        key = tl.load(own, mask=inside, other=0.0)
        value = tl.load(own + (HEADS // GROUP) * SIZE, mask=inside, other=0.0)
        writes = inside & (head % GROUP == 0) & (here != 0)
        place = cache + position * SIZE + channel
        tl.store(keys + place, key.to(keys.dtype.element_ty), mask=writes)
        tl.store(values + place, value.to(values.dtype.element_ty), mask=writes)
        most = tl.sum(query * key.to(tl.float32), 0)
        total += 1.0
        mixed += value.to(tl.float32)
    blocks = (length + KEYS - 1) // KEYS
    start = (blocks * split // SPLITS) * KEYS
    end = tl.minimum((blocks * (split + 1) // SPLITS) * KEYS, length)
    while start < end:
        at = start + tl.arange(0, KEYS)
        mask = (at < end)[:, None] & inside[None, :]
        place = cache + at[:, None] * SIZE + channel[None, :]
        key = tl.load(keys + place, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(at < end, tl.sum(key * query[None, :], 1), -float("inf"))
        higher = tl.maximum(most, tl.max(score, 0))
        weight = tl.exp2(score - higher)
        value = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
        change = tl.exp2(most - higher)
        mixed = mixed * change + tl.sum(value * weight[:, None], 0)
        total = total * change + tl.sum(weight, 0)
        most = higher
        start += KEYS
    if SPLITS == 1:
        place = (row * HEADS + head) * SIZE + channel
        tl.store(out + place, (mixed / total).to(out.dtype.element_ty), mask=inside)
    else:
        place = partial + ((row * HEADS + head) * SPLITS + split) * (WIDTH + 2)
        tl.store(place + channel, mixed)
        tl.store(place + WIDTH, most)
        tl.store(place + WIDTH + 1, total)


@triton.jit
def combine(
    partial,
    out,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts of one query of one row, put together; the arguments are those of `attention`."""
    which = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    split = tl.arange(0, SPLITS)
    place = partial + (which * SPLITS + split) * (WIDTH + 2)
    most = tl.load(place + WIDTH)
    weight = tl.exp2(most - tl.max(most, 0))
    total = tl.sum(tl.load(place + WIDTH + 1) * weight, 0)
    mixed = tl.load(place[:, None] + channel[None, :])
    mixed = tl.sum(mixed * weight[:, None], 0) / total
    tl.store(out + which * SIZE + channel, mixed.to(out.dtype.element_ty), mask=channel < SIZE)


@triton.jit
def add_norm(
    stream,
    branch,
    weight,
    bias,
    out,
    eps,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    RMS: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Add a branch to a row of the residual stream, and normalise the sum.

    Args:
        stream: (R, COLUMNS) fp32, overwritten by the sum, or with ``KEEP`` by its norm.
        branch: (R, COLUMNS), read with ``ADD``.
        weight: (COLUMNS,), read with ``SCALED``.
        bias: (COLUMNS,), read with ``BIASED``.
        out: (R, COLUMNS), the norm.
        eps: added to the variance.
        COLUMNS: of a row.
        WIDTH: ``COLUMNS``, rounded up to a power of two.
        ADD: whether there is a branch.
        RMS: whether the mean stays.
        SCALED: whether there is a weight.
        BIASED: whether there is a bias.
        KEEP: whether the norm is the stream (post-norm).
    """
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < COLUMNS
    place = row * COLUMNS + column
    x = tl.load(stream + place, mask=inside, other=0.0)
    if ADD:
        x += tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
    centred = x
    if not RMS:
        centred = tl.where(inside, x - tl.sum(x, 0) / COLUMNS, 0.0)
    y = centred / tl.sqrt(tl.sum(centred * centred, 0) / COLUMNS + eps)
    if SCALED:
        y *= tl.load(weight + column, mask=inside, other=0.0)
    if BIASED:
        y += tl.load(bias + column, mask=inside, other=0.0)
    if KEEP:
        tl.store(stream + place, y, mask=inside)
    elif ADD:
        tl.store(stream + place, x, mask=inside)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


def splits(rows: int, heads: int) -> int:
    """Parts of a row's keys: enough programs for a GPU, however few rows there are."""
    return min(16, triton.next_power_of_2(max(1, PROGRAMS // (rows * heads))))


def keys_of(width: int) -> int:
    """Keys that a program handles together."""
    return max(16, min(64, TILE // width))


def attention_(
    qkv: Tensor, cache: Tensor, positions: Tensor, active: Tensor, n_head: int
) -> Tensor:
    """`gpt_dist.ops.decode.decode_attention_`."""
    rows, (_, _, kv_heads, _, size) = len(qkv), cache.shape
    out = torch.empty(rows, n_head * size, dtype=qkv.dtype, device=qkv.device)
    width, parts = triton.next_power_of_2(size), splits(rows, n_head)
    partial = out
    if parts > 1:
        shape = rows, n_head, parts, width + 2
        partial = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    sizes = {"SIZE": size, "WIDTH": width, "SPLITS": parts}
    with on(qkv):
        attention[(rows, n_head, parts)](  # type: ignore[index]
            qkv, cache[0], cache[1], positions, active, out, partial,
            cache.stride(1), cache.stride(2), size**-0.5,
            HEADS=n_head, GROUP=n_head // kv_heads, KEYS=keys_of(width), **sizes, **OPTIONS,
        )  # fmt: skip
        if parts > 1:
            combine[(rows * n_head,)](partial, out, **sizes, num_warps=1)  # type: ignore[index]
    return out


def add_norm_(
    stream: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, rms: bool, keep: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`gpt_dist.ops.decode.add_norm_`."""
    out = torch.empty_like(stream, dtype=dtype)
    rows, columns = stream.shape
    with on(stream):
        add_norm[(rows,)](  # type: ignore[index]
            stream, branch, weight, bias, out, eps,
            COLUMNS=columns, WIDTH=triton.next_power_of_2(columns), ADD=branch is not None,
            RMS=rms, SCALED=weight is not None, BIASED=bias is not None, KEEP=keep, num_warps=4,
        )  # fmt: skip
    return out
