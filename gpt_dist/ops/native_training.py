"""Bindings of ``native/training.cpp``: kernels of the training step for CPUs, in bf16 and fp32.

Without them (no compiler, another CPU, or ``GPT_DIST_KERNELS=0``) the operations run their
reference in PyTorch, which is slower; results agree up to rounding.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gpt_dist.errors import GptDistError
from gpt_dist.ops import build
from gpt_dist.ops.registry import concrete

_log = logging.getLogger(__name__)

_ARGUMENTS = {
    "attention": [c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_int],
    "attention_backward": [
        c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int,
    ],
    "layer_norm": [
        c_void_p, c_void_p, c_void_p, c_int, c_int, c_float, c_void_p, c_void_p, c_int,
    ],
    "layer_norm_backward": [
        c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_int,
    ],
    "rms_norm": [c_void_p, c_int, c_int, c_float, c_void_p, c_void_p, c_int],
    "rms_norm_backward": [c_void_p, c_void_p, c_void_p, c_int, c_int, c_void_p, c_int],
    "rotary": [
        c_void_p, c_void_p, c_int, c_int, c_int, c_int, c_int, c_float, c_void_p, c_void_p, c_int,
    ],
    "rotary_backward": [
        c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p, c_int,
    ],
    "gelu": [c_void_p, c_void_p, c_int64, c_int],
    "gelu_backward": [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int],
    "relu2": [c_void_p, c_void_p, c_int64, c_int],
    "relu2_backward": [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int],
    "cross_entropy": [c_void_p, c_void_p, c_int, c_int, c_int, c_float, c_void_p, c_int],
    "add": [c_void_p, c_void_p, c_void_p, c_int64, c_int],
}  # fmt: skip


_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@cache
def kernels() -> dict[str, Callable[..., None]] | None:
    """Name → kernel, or None where they are unavailable; the reason is logged once."""
    if build.disabled():
        return None
    try:
        lib = build.load("training.cpp")
    except GptDistError as error:
        _log.warning("training without the CPU kernels, which is slower: %s", error)
        return None
    return {
        f"{name}_{suffix}": ctypes.CFUNCTYPE(None, *arguments).in_dll(lib, f"{name}_{suffix}")
        for name, arguments in _ARGUMENTS.items()
        for suffix in _SUFFIXES.values()
    }


def takes(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the kernels can read a tensor: on the CPU, of ``dtypes``, by default bf16 or fp32."""
    on_cpu = x.device.type == "cpu"
    return on_cpu and x.dtype in (dtypes or _SUFFIXES) and concrete(x) and kernels() is not None


def run(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call a kernel of a dtype; tensors must be contiguous, None is a null pointer."""
    found = kernels()
    assert found is not None
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    found[f"{name}_{_SUFFIXES[dtype]}"](*values, torch.get_num_threads())
