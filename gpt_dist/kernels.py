"""Build ``native/``, and bind the decoder's forward pass for CPUs with AVX-512 BF16 and VNNI.

Each part is compiled once, by the C++ compiler that is there, in a few seconds, and kept in the
user's cache directory; ``python -m gpt_dist.kernels`` does that ahead of time. Without a compiler
or on other CPUs everything runs in plain PyTorch, which is slower, several times so in decoding.
``GPT_DIST_KERNELS=0`` asks for that too.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt_dist.errors import GptDistError, run_main

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("native")
FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")
FLAGS = ["-O3", "-fPIC", "-shared"]
VECTORS = [
    # Multiplications and additions fuse only where the source says so: the same in every tile.
    "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-mfma", *(f"-m{feature.replace('_', '')}" for feature in FEATURES),
]  # fmt: skip
MAX_HEAD_SIZE = 4096
DTYPES = {"fp32": 0, "bf16": 1, "int8": 2}


class Linear(Structure):
    _fields_ = (
        ("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p),
        ("outputs", c_int32), ("inputs", c_int32),
    )  # fmt: skip


class Norm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float))


class Layer(Structure):
    _fields_ = (
        ("ln_1", Norm), ("ln_2", Norm),
        ("qkv", Linear), ("mix", Linear), ("up", Linear), ("down", Linear),
    )  # fmt: skip


class Model(Structure):
    _fields_ = (
        ("dtype", c_int32), ("pre_norm", c_int32), ("n_layer", c_int32), ("n_head", c_int32),
        ("head_size", c_int32), ("width", c_int32), ("hidden", c_int32),
        ("wte", c_void_p), ("wpe", c_void_p), ("layers", POINTER(Layer)),
        ("final_norm", Norm), ("head", Linear),
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


@cache
def decoder_library() -> ctypes.CDLL | None:
    """The decoder's kernels, or None where they cannot be had; the reason is logged once."""
    if disabled():
        return None
    try:
        return _bind(load("decoder.cpp"))
    except GptDistError as error:
        _log.warning("decoding without the CPU kernels, which is slower: %s", error)
        return None


def disabled() -> bool:
    """Whether plain PyTorch was asked for."""
    return os.environ.get("GPT_DIST_KERNELS") == "0"


def load(source: str, features: Sequence[str] = FEATURES) -> ctypes.CDLL:
    """The shared library of a source, compiled now if it has not been before.

    Args:
        source: a file of ``native/``.
        features: what it needs of the CPU.

    Raises:
        GptDistError: it cannot be had here; says why in one line.
    """
    reason = unavailable(features)
    if reason:
        raise GptDistError(reason)
    try:
        return ctypes.CDLL(str(build(source)))
    except (OSError, subprocess.SubprocessError) as error:
        details = getattr(error, "stderr", None) or str(error)
        raise GptDistError(f"building {source} failed: {details.strip().splitlines()[0]}") from None


def unavailable(features: Sequence[str] = FEATURES) -> str | None:
    """Why this machine cannot build or run the kernels; None where it can."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    missing = [feature for feature in features if feature not in flags]
    if missing:
        return f"this CPU has no {missing[0]}"
    return None if _compiler() else "there is no C++ compiler (g++)"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")


def build(source: str) -> Path:
    """Path of the shared library of a source; compiles it if it has not been compiled before."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    before, after = _options(source)
    settings = _compiler(), before, after, torch.__version__
    key = hashlib.sha256(sources + repr(settings).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_dist"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="gpt_dist-"))
    path = folder / f"{Path(source).stem}-{key[:16]}.so"
    if not path.exists():
        _log.info("compiling %s, once, into %s", source, path)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            command = [str(_compiler()), *before, str(SOURCES / source), *after, "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            built.replace(path)
    return path


def _options(source: str) -> tuple[list[str], list[str]]:
    """The compiler's options before and after the source."""
    if source != "allocator.cpp":
        return [*FLAGS, *VECTORS], []
    home = Path(torch.__file__).parent  # the allocator is one of PyTorch's classes
    libraries = home / "lib"
    return (
        [*FLAGS, "-std=c++20", f"-I{home / 'include'}"],
        [f"-L{libraries}", "-lc10", f"-Wl,-rpath,{libraries}"],
    )


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
    """(size,) zeros of bytes in huge pages where the system has them: streams read faster."""
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, np.uint8))[:size]


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data."""
    return None if tensor is None else tensor.data_ptr()


def pack(weight: Tensor, bias: Tensor | None, dtype: str, keep: list[Any]) -> Linear:
    """Pack a (outputs, inputs) matrix as the kernels read it; ``keep`` owns the memory."""
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
    return Linear(packed.data_ptr(), scale.data_ptr(), pointer(bias), outputs, inputs)


def norm(module: Any, keep: list[Any]) -> Norm:
    """A layer norm's parameters in fp32; ``keep`` owns them."""
    return Norm(pointer(own(module.weight, keep)), pointer(own(module.bias, keep)), module.eps)


def own(tensor: Tensor | None, keep: list[Any]) -> Tensor | None:
    """A contiguous fp32 copy on the CPU, which ``keep`` owns."""
    if tensor is None:
        return None
    copied = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    keep.append(copied)
    return copied


def main() -> None:
    """Build the kernels now.

    Raises:
        GptDistError: they cannot be had here; says why.
    """
    reason = unavailable()
    if reason:
        raise GptDistError(f"no CPU kernels here: {reason}; everything runs in plain PyTorch")
    try:
        for source in ("decoder.cpp", "training.cpp"):
            print(f"CPU kernels: {build(source)}")
    except subprocess.CalledProcessError as error:
        raise GptDistError(f"building the CPU kernels failed:\n{error.stderr}") from None
    try:
        print(f"allocator: {build('allocator.cpp')}")
    except subprocess.CalledProcessError as error:
        print(f"no allocator, training takes a little more memory:\n{error.stderr}")


if __name__ == "__main__":
    run_main(main)
