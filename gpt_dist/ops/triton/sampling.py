"""The choice of the next token, a program a row: no sort, no table of the vocabulary in fp64.

Truncation is one threshold a row. It is found by bisecting the values' bits, counting or weighing
what lies above; a row's scores stay in the multiprocessor's cache meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpt_dist.ops.decode import SAMPLING_BLOCK, scratch_width
from gpt_dist.ops.triton.cross_entropy import LOG2_E, on


@triton.jit
def _ordered(score):
    """Integers in the order of fp32 values."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mix(z):
    """The finaliser of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def sample(
    logits,
    scores,
    scales,
    numbers,
    bias,
    count,
    prompt,
    stop,
    flags,
    positions,
    generated,
    active,
    dropped,
    inputs,
    tokens,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Choose a row's token; where the row is active, make it the next step's input.

    Args:
        logits: (R, COLUMNS) fp32.
        scores: (R, PARTS * BLOCK) fp32, scratch.
        scales: (R, 6) fp32: temperature, top_p, log of min_p, repetition, presence, frequency.
        numbers: (R, 3) int64: top_k (1: greedy), seed, min_new_tokens.
        bias: (R, CLASSES) fp32, read where bit 0 of ``flags`` is set.
        count: (R, CLASSES) int32, tokens generated, read and counted where bit 1 is set.
        prompt: (R, CLASSES) int8, as ``count``.
        stop: (R, CLASSES) int8, read where bit 2 is set.
        flags: (R,) int32.
        positions: (R,) int64, of the row's last token; advanced where the row is active.
        generated: (R,) int64, tokens generated before; likewise.
        active: (R,) int64.
        dropped: (R,) int64, tokens before those in the cache.
        inputs: (R,) int64, the next step's tokens.
        tokens: (R,) int64, written for all rows.
        COLUMNS: of a row of logits.
        CLASSES: columns that are not padding.
        BLOCK: columns of a part.
        PARTS: parts of a row.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * COLUMNS
    scores += row * PARTS * BLOCK
    table = row * CLASSES
    temperature = tl.load(scales + row * 6)
    top_p = tl.load(scales + row * 6 + 1)
    log_min_p = tl.load(scales + row * 6 + 2)
    repetition = tl.load(scales + row * 6 + 3)
    presence = tl.load(scales + row * 6 + 4)
    frequency = tl.load(scales + row * 6 + 5)
    top_k = tl.load(numbers + row * 3)
    seed = tl.load(numbers + row * 3 + 1)
    least_new = tl.load(numbers + row * 3 + 2)
    flag = tl.load(flags + row)
    position = tl.load(positions + row)
    made = tl.load(generated + row)
    at = tl.arange(0, BLOCK)

    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for n in range(PARTS):
        column = n * BLOCK + at
        inside = column < CLASSES
        score = tl.load(logits + column, mask=column < COLUMNS, other=0.0)
        score += tl.load(bias + table + column, mask=inside & ((flag & 1) != 0), other=0.0)
        penalised = inside & ((flag & 2) != 0)
        times = tl.load(count + table + column, mask=penalised, other=0)
        said = tl.load(prompt + table + column, mask=penalised, other=0)
        changed = tl.where(score < 0, score * repetition, score / repetition)
        score = tl.where((times > 0) | (said != 0), changed, score)
        score -= frequency * times + presence * tl.where(times > 0, 1.0, 0.0)
        ends = tl.load(stop + table + column, mask=inside & ((flag & 4) != 0), other=0)
        score = tl.where((ends != 0) & (made < least_new), -float("inf"), score)
        score = tl.where(inside, score, -float("inf"))
        tl.store(scores + column, score)
        highest = tl.maximum(highest, score)
    most = tl.max(highest, 0)

    if top_k == 1:
        first = tl.full((BLOCK,), CLASSES - 1, tl.int32)
        for n in range(PARTS):
            column = n * BLOCK + at
            score = tl.load(scores + column)
            first = tl.minimum(first, tl.where(score == most, column, CLASSES - 1))
        token = tl.min(first, 0)
    else:
        # Bounds: enough lies at or above ``low``, too little at or above ``high``.
        low = tl.full((), -(2**31), tl.int64)
        high = _ordered(most).to(tl.int64) + 1
        above_low = tl.full((), CLASSES, tl.int32)
        above_high = tl.zeros((), tl.int32)
        while (top_k < CLASSES) & (high - low > 1) & (above_low - above_high > 1):
            middle = (low + high) // 2
            found = tl.zeros((BLOCK,), tl.int32)
            for n in range(PARTS):
                score = tl.load(scores + n * BLOCK + at)
                found += tl.where(_ordered(score) >= middle, 1, 0)
            above = tl.sum(found, 0)
            enough = above >= top_k
            low = tl.where(enough, middle, low)
            above_low = tl.where(enough, above, above_low)
            high = tl.where(enough, high, middle)
            above_high = tl.where(enough, above_high, above)
        threshold = low
        factor = LOG2_E / temperature

        if top_p < 1:
            mass = tl.zeros((BLOCK,), tl.float32)
            kept = tl.zeros((BLOCK,), tl.int32)
            for n in range(PARTS):
                score = tl.load(scores + n * BLOCK + at)
                keep = _ordered(score) >= threshold
                mass += tl.where(keep, tl.exp2((score - most) * factor), 0.0)
                kept += tl.where(keep, 1, 0)
            wanted = tl.sum(mass, 0) * top_p
            high = _ordered(most).to(tl.int64) + 1
            above_low = tl.sum(kept, 0)
            above_high = tl.zeros((), tl.int32)
            while (high - low > 1) & (above_low - above_high > 1):
                middle = (low + high) // 2
                mass = tl.zeros((BLOCK,), tl.float32)
                kept = tl.zeros((BLOCK,), tl.int32)
                for n in range(PARTS):
                    score = tl.load(scores + n * BLOCK + at)
                    keep = _ordered(score) >= middle
                    mass += tl.where(keep, tl.exp2((score - most) * factor), 0.0)
                    kept += tl.where(keep, 1, 0)
                enough = tl.sum(mass, 0) >= wanted
                above = tl.sum(kept, 0)
                low = tl.where(enough, middle, low)
                above_low = tl.where(enough, above, above_low)
                high = tl.where(enough, high, middle)
                above_high = tl.where(enough, above_high, above)
            threshold = low
        floor = most + temperature * log_min_p

        whole = tl.zeros((), tl.float64)
        for n in range(PARTS):
            score = tl.load(scores + n * BLOCK + at)
            keep = (_ordered(score) >= threshold) & (score >= floor)
            whole += tl.sum(tl.where(keep, tl.exp2((score - most) * factor), 0.0), 0).to(tl.float64)
        place = (position + tl.load(dropped + row) + 1).to(tl.uint64)
        golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        drawn = _mix(_mix(seed.to(tl.uint64, bitcast=True) + golden) + place * golden) >> 32
        target = drawn.to(tl.float64) * (1.0 / 4294967296.0) * whole
        before = tl.zeros((), tl.float64)
        token = tl.full((), CLASSES, tl.int32)
        last = tl.zeros((), tl.int32)
        for n in range(PARTS):
            column = n * BLOCK + at
            score = tl.load(scores + column)
            keep = (_ordered(score) >= threshold) & (score >= floor)
            weight = tl.where(keep, tl.exp2((score - most) * factor), 0.0)
            reached = tl.cumsum(weight, 0) > (target - before).to(tl.float32)
            token = tl.minimum(token, tl.min(tl.where(reached & (weight > 0), column, CLASSES), 0))
            last = tl.maximum(last, tl.max(tl.where(weight > 0, column, 0), 0))
            before += tl.sum(weight, 0).to(tl.float64)
        token = tl.where(token < CLASSES, token, last)

    tl.store(tokens + row, token.to(tl.int64))
    here = tl.load(active + row) != 0
    counted = count + table + token
    times = tl.load(counted, mask=here & ((flag & 2) != 0), other=0)
    tl.store(counted, times + 1, mask=here & ((flag & 2) != 0))
    tl.store(inputs + row, token.to(tl.int64), mask=here)
    tl.store(positions + row, position + 1, mask=here)
    tl.store(generated + row, made + 1, mask=here)


def sample_(
    logits: Tensor, classes: int, scales: Tensor, numbers: Tensor, bias: Tensor, count: Tensor,
    prompt: Tensor, stop: Tensor, flags: Tensor, inputs: Tensor, dropped: Tensor, scores: Tensor,
    tokens: Tensor,
) -> None:  # fmt: skip
    """`gpt_dist.ops.decode.sample_`."""
    rows, columns = logits.shape
    ids, positions, generated, active = inputs.unbind()
    with on(logits):
        sample[(rows,)](  # type: ignore[index]
            logits, scores, scales, numbers, bias, count, prompt, stop, flags, positions, generated,
            active, dropped, ids, tokens, COLUMNS=columns, CLASSES=classes, BLOCK=SAMPLING_BLOCK,
            PARTS=scratch_width(classes) // SAMPLING_BLOCK, num_warps=16,
        )  # fmt: skip
