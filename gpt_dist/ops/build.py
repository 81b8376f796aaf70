"""Compile ``native/`` for the CPU at hand.

The machine's own C++ compiler compiles each source once; the user's cache directory keeps the
result. ``python -m gpt_dist.kernels`` does it ahead of time. Without kernels everything runs in
plain PyTorch, which is slower. Two environment variables decide:

``GPT_DIST_KERNELS=0``
    Use no kernels.
``GPT_DIST_CPU=avx2`` or ``avx512``
    Compile for this instruction set instead of the widest that the CPU has.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from gpt_dist.errors import GptDistError

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("native")
KERNELS = ("decoder.cpp", "training.cpp")
INSTRUCTION_SETS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"),
    "avx2": ("avx2", "fma"),
}
"""What the kernels can be compiled for, widest first: features as Linux names them."""
FLAGS = [
    "-O3", "-fPIC", "-shared", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    # Only an explicit `fma` fuses a product and a sum, so that all tiles round alike.
    "-ffp-contract=off", "-mfma",
]  # fmt: skip


def disabled() -> bool:
    """Whether plain PyTorch was asked for."""
    return os.environ.get("GPT_DIST_KERNELS") == "0"


def instruction_set() -> str:
    """The key of `INSTRUCTION_SETS` to compile for.

    Raises:
        GptDistError: the CPU has none of them, or not the one in ``GPT_DIST_CPU``.
    """
    wanted = os.environ.get("GPT_DIST_CPU")
    if wanted and wanted not in INSTRUCTION_SETS:
        raise GptDistError(f"GPT_DIST_CPU={wanted}: choose one of {', '.join(INSTRUCTION_SETS)}")
    present, missing = cpu_features(), ""
    for name in [wanted] if wanted else INSTRUCTION_SETS:
        absent = [feature for feature in INSTRUCTION_SETS[name] if feature not in present]
        if not absent:
            return name
        missing = absent[0]
    raise GptDistError(f"this CPU has no {missing}")


def cpu_features() -> set[str]:
    """Features of the CPU as Linux names them; none on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(text.partition("flags")[2].partition("\n")[0].split())


def load(source: str) -> ctypes.CDLL:
    """The shared library of a file in ``native/``, compiled now if it is not in the cache.

    Raises:
        GptDistError: it cannot be had here; says why in one line.
    """
    try:
        return ctypes.CDLL(str(build(source)))
    except (OSError, subprocess.SubprocessError) as error:
        details = getattr(error, "stderr", None) or str(error)
        raise GptDistError(f"building {source} failed: {details.strip().splitlines()[0]}") from None


def unavailable() -> str | None:
    """Why this machine cannot build or run the kernels; None where it can."""
    try:
        cached = all(_path(source).exists() for source in KERNELS)
        if not cached:
            _compiler()
    except GptDistError as error:
        return str(error)
    return None


def build(source: str) -> Path:
    """Path of the shared library of a source; compiles it if it is not in the cache.

    Raises:
        GptDistError: the CPU lacks instructions, or there is no compiler.
        subprocess.CalledProcessError: the compiler failed.
    """
    path = _path(source)
    if path.exists():
        return path
    compiler = _compiler()
    options = _options()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=path.parent))
    except OSError:  # the cache cannot be written: this process compiles for itself
        path = Path(tempfile.mkdtemp(prefix="gpt_dist-")) / path.name
        scratch = Path(tempfile.mkdtemp(dir=path.parent))
    _log.info("compiling %s, once, into %s", source, path)
    built = scratch / path.name
    command = [compiler, *options, str(SOURCES / source), "-o", str(built)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        built.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _path(source: str) -> Path:
    """Where the cache keeps a library. The name tells sources and options, not the compiler."""
    files = sorted(SOURCES.glob("*.h"))
    content = b"".join(path.read_bytes() for path in [*files, SOURCES / source])
    key = hashlib.sha256(content + repr(_options()).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gpt_dist" / f"{Path(source).stem}-{key[:16]}.so"


def _compiler() -> str:
    names = os.environ.get("CXX", ""), "g++", "clang++"
    for path in map(shutil.which, names):
        if path:
            return path
    raise GptDistError("there is no C++ compiler (g++)")


def _options() -> list[str]:
    features = INSTRUCTION_SETS[instruction_set()]
    return [*FLAGS, *(f"-m{name.replace('_', '')}" for name in features)]
