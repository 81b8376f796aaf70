"""Bindings of ``ops/native/decoder.cpp``: its structures, its functions and packed weights."""

from __future__ import annotations

import ctypes
import logging
import mmap
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt_dist import ops
from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError
from gpt_dist.ops.build import disabled, load

_log = logging.getLogger(__name__)

MAX_HEAD_SIZE = 4096
DTYPES = {"fp32": 0, "bf16": 1, "int8": 2}
NORMS = {"layer": 1, "rms": 2}
ACTIVATIONS = {"gelu": 2, "relu2": 3}


class Linear(Structure):
    _fields_ = (
        ("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p),
        ("outputs", c_int32), ("inputs", c_int32), ("cap", c_float),
    )  # fmt: skip


class Norm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("kind", c_int32))


class Layer(Structure):
    _fields_ = (
        ("ln_1", Norm), ("ln_2", Norm),
        ("qkv", Linear), ("mix", Linear), ("up", Linear), ("down", Linear),
    )  # fmt: skip


class Model(Structure):
    _fields_ = (
        ("dtype", c_int32), ("pre_norm", c_int32), ("n_layer", c_int32), ("n_head", c_int32),
        ("n_kv_head", c_int32), ("head_size", c_int32), ("width", c_int32), ("hidden", c_int32),
        ("activation", c_int32), ("turned_eps", c_float),
        ("wte", c_void_p), ("wpe", c_void_p), ("rotations", c_void_p), ("layers", POINTER(Layer)),
        ("first_norm", Norm), ("final_norm", Norm), ("head", Linear),
    )  # fmt: skip


class Cache(Structure):
    _fields_ = (
        ("keys", c_void_p), ("values", c_void_p), ("slots", c_int32), ("context", c_int32)
    )  # fmt: skip


class Rows(Structure):
    _fields_ = (
        ("count", c_int32), ("ids", c_void_p), ("slots", c_void_p), ("positions", c_void_p),
        ("logits", c_void_p), ("stride", c_int64), ("shared", c_int32),
    )  # fmt: skip


class Draw(Structure):
    _fields_ = (
        ("temperature", c_float), ("top_p", c_float), ("log_min_p", c_float),
        ("repetition", c_float), ("presence", c_float), ("frequency", c_float),
        ("top_k", c_int32), ("logprobs", c_int32), ("prompt", c_int32), ("length", c_int32),
        ("min_new", c_int32), ("stops", c_int32), ("biases", c_int32), ("seed", c_uint64),
        ("history", c_void_p), ("stop_ids", c_void_p), ("bias_ids", c_void_p), ("bias", c_void_p),
    )  # fmt: skip


def decoder_library() -> ctypes.CDLL | None:
    """The decoder's kernels, or None where they are switched off or unavailable."""
    return None if disabled() else _library()


@cache
def _library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be loaded; the reason is logged once."""
    try:
        return _bind(load("decoder.cpp"))
    except GptDistError as error:
        _log.warning("decoding without the CPU kernels, which is slower: %s", error)
        return None


def _bind(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.packed_bytes.restype = lib.scratch_bytes.restype = c_int64
    lib.packed_bytes.argtypes = [c_int32] * 3
    lib.pack.argtypes = [c_int32, c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_int32]
    lib.pack.restype = lib.forward.restype = None
    lib.scratch_bytes.argtypes = [POINTER(Model), c_int32, c_int32, c_int32]
    lib.forward.argtypes = [
        POINTER(Model), POINTER(Cache), POINTER(Rows), c_void_p, c_int32, POINTER(Draw),
        c_void_p, c_void_p, c_void_p, c_int32,
    ]  # fmt: skip
    return lib


def buffer(size: int) -> Tensor:
    """(size,) zero bytes, in huge pages where possible: they make streaming reads faster."""
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, np.uint8))[:size]


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data."""
    return None if tensor is None else tensor.data_ptr()


def pack(
    weight: Tensor, bias: Tensor | None, dtype: str, keep: list[Any], cap: float = 0.0
) -> Linear:
    """Pack an (outputs, inputs) matrix for the kernels; ``keep`` owns the memory."""
    lib = decoder_library()
    assert lib is not None
    weight = weight.detach().to("cpu", torch.float32).contiguous()
    outputs, inputs = weight.shape
    packed = buffer(lib.packed_bytes(DTYPES[dtype], outputs, inputs))
    scale = torch.ones(outputs)
    lib.pack(
        DTYPES[dtype], weight.data_ptr(), outputs, inputs, packed.data_ptr(), scale.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    bias = own(bias, keep)
    keep += [packed, scale]
    return Linear(packed.data_ptr(), scale.data_ptr(), pointer(bias), outputs, inputs, cap)


def norm(module: Any, kind: str, keep: list[Any]) -> Norm:
    """A norm and, of a layer norm, its parameters in fp32; ``keep`` owns them."""
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    return Norm(pointer(own(weight, keep)), pointer(own(bias, keep)), module.eps, NORMS[kind])


def rotations(config: ModelConfig, keep: list[Any]) -> int | None:
    """Address of the rotations of every position, where positions are such; ``keep`` owns them."""
    if config.parts.positions != "rotary":
        return None
    positions = torch.arange(config.context_length)
    turns = ops.rotations(positions, config.head_size, config.parts.rotary_base)
    return pointer(own(turns, keep))


def own(tensor: Tensor | None, keep: list[Any]) -> Tensor | None:
    """A contiguous fp32 copy on the CPU, which ``keep`` owns."""
    if tensor is None:
        return None
    copied = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    keep.append(copied)
    return copied
