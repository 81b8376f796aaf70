"""Orthogonalisation of matrices by Newton-Schulz iterations, for Muon."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial, from Muon's reference implementation."""

STEPS = 5
"""Iterations of the reference implementation."""

BATCH_ELEMENTS = 2**26
"""Elements that are iterated together on a device other than the CPU."""


@cache
def arithmetic(device: str) -> torch.dtype:
    """dtype of products in bf16: fp32 on CPUs that emulate bf16, which is 20 times slower."""
    emulated = device == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return torch.float32 if emulated else torch.bfloat16


def orthogonalize(
    matrices: list[Tensor],
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    steps: int = STEPS,
) -> list[Tensor]:
    """Set the singular values of matrices to about 1 (0.7 to 1.2, tiny ones less).

    In bf16 every intermediate result is rounded to it, whatever dtype computes it, so that a run
    may move between machines. A CPU iterates one matrix at a time, which then stays in its cache.

    Args:
        matrices: (M, N) or (N, M) each, on one device, in bf16 or fp32.
        coefficients: of x, x³ and x⁵ in the polynomial of one iteration.
        steps: number of iterations.

    Returns:
        Matrices of the same shapes. Of matrices in bf16 the values are bf16 numbers, whatever
        dtype holds them.
    """
    results: list[Tensor] = []
    on_cpu = not matrices or matrices[0].device.type == "cpu"
    count = 1 if on_cpu else max(1, BATCH_ELEMENTS // matrices[0].numel())
    for first in range(0, len(matrices), count):
        wide = [m.T if m.shape[0] > m.shape[1] else m for m in matrices[first : first + count]]
        batch = wide[0][None] if len(wide) == 1 else torch.stack(wide)
        results += iterate(batch, coefficients, steps)
    return [x.T if m.shape[0] > m.shape[1] else x for m, x in zip(matrices, results, strict=True)]


def iterate(batch: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Newton-Schulz on a batch (B, M, N) with M at most N, in bf16 or fp32."""
    emulated = batch.dtype == torch.bfloat16 and arithmetic(batch.device.type) == torch.float32

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().float() if emulated else x

    a, b, c = coefficients
    x = batch.float() if emulated else batch
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = rounded(x / rounded(norm).clamp(min=1e-7))
    for _ in range(steps):
        gram = rounded(x @ x.mT)
        update = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        x = rounded(torch.baddbmm(x, update, x, beta=a))
    return x
