"""Bindings of ``native/training.cpp``: bf16 kernels of the training step for CPUs.

Without them (no compiler, another CPU, or ``GPT_DIST_KERNELS=0``) the operations run their
reference in PyTorch, which is slower; results agree up to rounding.
"""

from __future__ import annotations

import ctypes
import logging
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
    "gelu": [c_void_p, c_void_p, c_int64, c_int],
    "gelu_backward": [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int],
    "cross_entropy": [c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_int],
    "add": [c_void_p, c_void_p, c_void_p, c_int64, c_int],
}  # fmt: skip


@cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are unavailable; the reason is logged once."""
    if build.disabled():
        return None
    try:
        lib = build.load("training.cpp")
    except GptDistError as error:
        _log.warning("training without the CPU kernels, which is slower: %s", error)
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    return lib


def takes(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels can read this CPU tensor, expected in ``dtype``."""
    return x.dtype == dtype and concrete(x) and kernels() is not None


def run(name: str, *arguments: Any) -> None:
    """Call a kernel; tensors must be contiguous, None is a null pointer."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(kernels(), name)(*values, torch.get_num_threads())
