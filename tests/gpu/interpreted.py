"""Run the Triton kernels in Triton's interpreter, against float64; prints one JSON object.

A program of its own, because Triton reads ``TRITON_INTERPRET`` when it is imported. What a kernel
moves is counted: bytes of the loads and stores that its masks let through.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn import functional as F
from triton.runtime import interpreter

from gpt_dist.inference.sampling import Sampler, SamplingParams
from gpt_dist.ops import decode as reference
from gpt_dist.ops.triton import cross_entropy, decode, sampling


class Moved:
    """Bytes that kernels loaded and stored."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, pointers: Any, mask: Any) -> None:
        self.bytes += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8


@contextmanager
def counting() -> Iterator[Moved]:
    """Count what kernels move meanwhile."""
    moved, builder = Moved(), interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        moved.add(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved.add(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield moved
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def entropy(
    vocabulary: int, rows: int, dtype: str, ignored: int, cap: float = 0.0
) -> dict[str, float]:
    """One cross-entropy: largest errors relative to rounding, bytes relative to the least."""
    torch.manual_seed(vocabulary + rows)
    padded = -(-vocabulary // 128) * 128
    logits = (torch.randn(rows, padded) * 4).to(getattr(torch, dtype))
    targets = torch.randint(vocabulary, (rows,))
    targets[:ignored] = -1
    with torch.inference_mode(False), torch.enable_grad():
        exact = logits[:, :vocabulary].double().requires_grad_()
        bent = cap * torch.tanh(exact / cap) if cap else exact
        wanted = F.cross_entropy(bent, targets.clone(), ignore_index=-1, reduction="none")
        (slopes,) = torch.autograd.grad(wanted.sum(), exact)
    with counting() as moved:
        losses = cross_entropy.cross_entropy_(logits, targets, vocabulary, cap)
    # A unit in the last place: the interpreter truncates to bf16, where a GPU rounds.
    step = 2**-7 if dtype == "bfloat16" else 1e-5
    off = (logits[:, :vocabulary].double() - slopes).abs() / (step * slopes.abs() + 1e-9)
    return {
        "loss": float((losses.double() - wanted.detach()).abs().max()),
        "gradient": float(off.max()),
        "padding": float(logits[:, vocabulary:].abs().max()) if padded > vocabulary else 0.0,
        "ignored": float(logits[:ignored].abs().max()) if ignored else 0.0,
        "bytes": moved.bytes / (2 * logits.nbytes + targets.nbytes + losses.nbytes),
    }


def attention(
    heads: int, shared: int, size: int, lengths: list[int], dtype: torch.dtype, parts: int
) -> dict[str, float]:
    """One step's attention of rows of some lengths; the row before the last is not active."""
    torch.manual_seed(size)
    decode.PROGRAMS = parts * heads * len(lengths)
    rows, context = len(lengths), max(lengths) + 1
    qkv = torch.randn(rows, (heads + 2 * shared) * size).to(dtype)
    cache = torch.randn(2, rows + 1, shared, context, size).to(dtype)
    positions, active = torch.tensor(lengths), torch.ones(rows, dtype=torch.int64)
    active[rows - 2 : rows - 1] = 0
    exact, before = cache.double(), cache.clone()
    wanted = reference._attend(qkv.double(), exact, positions, active, heads)
    with counting() as moved:
        mixed = decode.attention_(qkv, cache, positions, active, heads)
    live = active != 0
    read = sum(length for length, on in zip(lengths, live.tolist(), strict=True) if on)
    least = (2 * shared * size * (read + int(live.sum())) + qkv.numel() + mixed.numel()) * (
        dtype.itemsize
    )
    written = torch.zeros(cache.shape[:4], dtype=torch.bool)
    for row in live.nonzero()[:, 0].tolist():
        written[:, row, :, lengths[row]] = True
    return {
        "error": float((mixed.double() - wanted)[live].abs().max()),
        "cache": float((cache.double() - exact).abs().max()),
        "elsewhere": float((cache != before)[~written].sum()),
        "bytes": moved.bytes / least,
    }


def norms(columns: int, rows: int, branch: bool, rms: bool, keep: bool) -> dict[str, float]:
    """A residual addition and the norm after it."""
    torch.manual_seed(columns)
    stream = torch.randn(rows, columns) * 3 + 1
    added = torch.randn(rows, columns).bfloat16() if branch else None
    weight, bias = (None, None) if rms else torch.randn(2, columns).unbind()
    exact = stream.double()
    wanted = reference._normalise(
        exact, None if added is None else added.double(),
        None if weight is None else weight.double(), None if bias is None else bias.double(),
        1e-5, rms, keep, torch.float64,
    )  # fmt: skip
    found = decode.add_norm_(stream, added, weight, bias, 1e-5, rms, keep, torch.float32)
    return {
        "norm": float((found.double() - wanted).abs().max()),
        "stream": float((stream.double() - exact).abs().max()),
    }


def choices(vocabulary: int) -> dict[str, float]:
    """Tokens of rows with every kind of sampling, beside those of the PyTorch sampler."""
    cases = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(top_k=50, seed=2),
        SamplingParams(top_p=0.9, seed=3, temperature=0.7),
        SamplingParams(min_p=0.1, seed=4),
        SamplingParams(top_k=7, top_p=0.8, min_p=0.01, temperature=1.3, seed=2**64 - 5),
        SamplingParams(top_k=20, seed=6, repetition_penalty=1.4, presence_penalty=0.3),
        SamplingParams(top_k=3, seed=7, frequency_penalty=0.5, logit_bias={3: 4.0, 5: -9.0}),
        SamplingParams(temperature=0.0, min_new_tokens=50, stop_ids=(1, 2, 8)),
        SamplingParams(temperature=1e-35, seed=9),
    ]
    torch.manual_seed(vocabulary)
    rows, padded = len(cases), -(-vocabulary // 128) * 128
    sampler = Sampler(rows, vocabulary, torch.device("cpu"))
    for slot, params in enumerate(cases):
        sampler.set(slot, params, [1, 2, 3])
    inputs = torch.zeros(4, rows, dtype=torch.int64)
    inputs[1], inputs[3] = torch.arange(rows) + 5, 1
    dropped, tokens = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    scores = torch.zeros(rows, reference.scratch_width(vocabulary))
    tables = sampler.all_tables()
    wrong = 0
    for _ in range(2):
        logits = torch.randn(rows, padded) * 3
        counts = tables[1].clone()
        index, made = inputs[1] + dropped + 1, inputs[2].clone()
        (wanted,) = sampler.sample(logits, sampler.plan(range(rows)), index, made, inputs[3])
        tables[1].copy_(counts)
        sampling.sample_(
            logits, vocabulary, sampler.scales, sampler.numbers, *tables, sampler.flags,
            inputs, dropped, scores, tokens,
        )  # fmt: skip
        wrong += int((tokens != wanted).sum()) + int((inputs[0] != wanted).sum())
    return {
        "wrong": wrong,
        "advanced": float((inputs[1] == torch.arange(rows) + 7).all() and (inputs[2] == 2).all()),
        "counted": float(tables[1].sum()),
    }


@torch.inference_mode()
def main() -> None:
    ragged, fp32, bf16 = [0, 1, 63, 64, 65, 9, 300], torch.float32, torch.bfloat16
    found = {
        "attention whole": attention(2, 2, 64, ragged, fp32, 1),
        "attention parts": attention(2, 2, 64, ragged, fp32, 4),
        "attention grouped": attention(4, 2, 48, [65, 7, 300], fp32, 2),
        "attention bf16": attention(1, 1, 64, ragged, bf16, 2),
        "attention one": attention(2, 2, 16, [700], fp32, 16),
        "norm first": norms(768, 3, branch=False, rms=False, keep=False),
        "norm added": norms(48, 3, branch=True, rms=False, keep=False),
        "norm rms": norms(100, 2, branch=True, rms=True, keep=False),
        "norm post": norms(64, 2, branch=True, rms=False, keep=True),
        "entropy capped 65": entropy(65, 3, "float32", 1, cap=5.0),
        "entropy capped 4096": entropy(4096, 2, "bfloat16", 1, cap=5.0),
        "entropy capped 60000": entropy(60000, 2, "bfloat16", 1, cap=5.0),
        "sample 65": choices(65),
        "sample 4200": choices(4200),
    }
    print(
        json.dumps(
            found
            | {
                f"entropy {vocabulary} {rows} {dtype} {ignored}": entropy(
                    vocabulary, rows, dtype, ignored
                )
                for vocabulary, rows, dtype, ignored in (
                    (50257, 1, "bfloat16", 0),
                    (50257, 3, "bfloat16", 1),
                    (50257, 2, "float32", 1),
                    (65, 5, "bfloat16", 2),
                    (65, 1, "bfloat16", 1),
                    (65, 3, "float32", 0),
                    (4096, 4, "bfloat16", 1),
                    (4096, 1, "float32", 0),
                    (60000, 2, "bfloat16", 1),
                )
            }
        )
    )


if __name__ == "__main__":
    main()
