"""The Triton kernels of a decoding step: exact, no spilled registers, no more bytes than live."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.conftest import Found
from tests.gpu.kernels import CAPABILITIES, resources


@pytest.mark.slow(20)
def test_attention_equals_float64(interpreted: Found) -> None:
    """Ragged lengths, an idle row, grouped heads, one part and several."""
    cases = {name: found for name, found in interpreted.items() if name.startswith("attention")}
    assert len(cases) == 5
    for name, found in cases.items():
        assert found["error"] < (2e-2 if "bf16" in name else 1e-5), name
        assert found["cache"] == found["elsewhere"] == 0, name


@pytest.mark.slow(20)
def test_attention_reads_what_lives(interpreted: Found) -> None:
    """With one part; several write their sums, fewer bytes than the keys of a long row."""
    assert interpreted["attention whole"]["bytes"] < 1.01
    for name in ("parts", "bf16", "one"):
        assert interpreted[f"attention {name}"]["bytes"] < 1.2


@pytest.mark.slow(20)
def test_norms_equal_float64(interpreted: Found) -> None:
    cases = {name: found for name, found in interpreted.items() if name.startswith("norm")}
    assert len(cases) == 4
    for name, found in cases.items():
        assert max(found.values()) < 1e-5, name


@pytest.mark.slow(20)
def test_sampling_equals_the_other_backends(interpreted: Found) -> None:
    """Every processor, ten rows of different settings at once, two steps."""
    for vocabulary in (65, 4200):
        found = interpreted[f"sample {vocabulary}"]
        assert found["wrong"] == 0
        assert found["advanced"] == 1
        assert found["counted"] == 4  # two rows count their tokens


Kernel = tuple[str, dict[str, str], dict[str, Any], dict[str, int]]
"""Name, signature, constants and options of a kernel."""


def attention(parts: int, size: int, group: int) -> Kernel:
    from gpt_dist.ops.triton.decode import OPTIONS, keys_of

    width = 1 << (size - 1).bit_length()
    signature = {
        "qkv": "*bf16", "keys": "*bf16", "values": "*bf16", "positions": "*i64",
        "active": "*i64", "out": "*bf16", "partial": "*fp32", "slot_stride": "i32",
        "head_stride": "i32", "scale": "fp32",
    }  # fmt: skip
    constants = {
        "HEADS": 12, "GROUP": group, "SIZE": size, "WIDTH": width,
        "SPLITS": parts, "KEYS": keys_of(width),
    }  # fmt: skip
    return "attention", signature, constants, OPTIONS


def add_norm(columns: int, rms: bool, keep: bool) -> Kernel:
    signature = {
        "stream": "*fp32", "branch": "*bf16", "weight": "*fp32", "bias": "*fp32", "out": "*bf16",
        "eps": "fp32",
    }  # fmt: skip
    constants = {
        "COLUMNS": columns, "WIDTH": 1 << (columns - 1).bit_length(), "ADD": True, "RMS": rms,
        "SCALED": not rms, "BIASED": not rms, "KEEP": keep,
    }  # fmt: skip
    return "add_norm", signature, constants, {"num_warps": 4}


@pytest.mark.slow(12)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spilling(capability: int) -> None:
    from gpt_dist.ops.triton import decode, sampling

    combine = (
        "combine",
        {"partial": "*fp32", "out": "*bf16"},
        {"SIZE": 64, "WIDTH": 64, "SPLITS": 16},
        {"num_warps": 1},
    )
    for name, signature, constants, options in (
        attention(16, 64, 1),
        attention(1, 64, 1),
        attention(4, 128, 2),
        attention(1, 128, 1),
        attention(16, 256, 1),
        add_norm(768, rms=False, keep=False),
        add_norm(1600, rms=True, keep=True),
        combine,
    ):
        found = resources(getattr(decode, name), signature, constants, options, capability)
        assert found.stack == found.local == 0, (name, constants)
    pointers = {
        "logits": "*fp32", "scores": "*fp32", "scales": "*fp32", "numbers": "*i64",
        "bias": "*fp32", "count": "*i32", "prompt": "*i8", "stop": "*i8", "flags": "*i32",
        "positions": "*i64", "generated": "*i64", "active": "*i64", "dropped": "*i64",
        "inputs": "*i64", "tokens": "*i64",
    }  # fmt: skip
    sizes = {"COLUMNS": 50304, "CLASSES": 50257, "BLOCK": 4096, "PARTS": 13}
    found = resources(sampling.sample, pointers, sizes, {"num_warps": 16}, capability)
    assert found.stack == found.local == 0, found
