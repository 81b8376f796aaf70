"""The peak speed of a device, for model FLOPs utilisation (the share of it that training uses)."""

from __future__ import annotations

import time
from functools import cache

import torch

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI300X": 1307.0,
    "MI250X": 191.5,
}
"""Dense bf16 (fp16 where there is no bf16) peak of one device, from the vendors' datasheets."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device, None where unknown.

    On a CPU it is measured, because a datasheet says little about the cores that are available.
    """
    if device.type == "cpu":
        return measured_matmul_flops(dtype, torch.get_num_threads())
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for model, tflops in PEAK_TFLOPS.items():
            if model in name:
                return tflops * 1e12
    return None


@cache
def measured_matmul_flops(dtype: torch.dtype, threads: int) -> float:
    """Best FLOP/s of a square matrix product with this process's threads.

    The product grows up to (1024, 1024), or until it would take a quarter of a second: bf16 takes
    several at that size on a CPU that emulates it.
    """
    best, size, took = 0.0, 64, 0.0
    while size < 1024 and 8 * took < 0.25:
        size *= 2
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        took = min(_seconds(a, b) for _ in range(3))
        best = max(best, 2 * size**3 / took)
    return best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start
