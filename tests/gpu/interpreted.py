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

from gpt_dist.ops.triton import cross_entropy


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


def entropy(vocabulary: int, rows: int, dtype: str, ignored: int) -> dict[str, float]:
    """One cross-entropy: largest errors relative to rounding, bytes relative to the least."""
    torch.manual_seed(vocabulary + rows)
    padded = -(-vocabulary // 128) * 128
    logits = (torch.randn(rows, padded) * 4).to(getattr(torch, dtype))
    targets = torch.randint(vocabulary, (rows,))
    targets[:ignored] = -1
    exact = logits[:, :vocabulary].double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
    (slopes,) = torch.autograd.grad(wanted.sum(), exact)
    with counting() as moved:
        losses = cross_entropy.cross_entropy_(logits, targets, vocabulary)
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


def main() -> None:
    print(
        json.dumps(
            {
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
