"""Compile ``native/`` for the CPU at hand.

Each source is compiled once, by the machine's own C++ compiler, and kept in the user's cache
directory; ``python -m gpt_dist.kernels`` does it ahead of time. Without a compiler, or with
``GPT_DIST_KERNELS=0``, everything runs in plain PyTorch, which is slower.
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
FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")
FLAGS = ["-O3", "-fPIC", "-shared"]
VECTORS = [
    # Multiplications and additions fuse only where the source says so: the same in every tile.
    "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-mfma", *(f"-m{feature.replace('_', '')}" for feature in FEATURES),
]  # fmt: skip


def disabled() -> bool:
    """Whether plain PyTorch was asked for."""
    return os.environ.get("GPT_DIST_KERNELS") == "0"


def load(source: str) -> ctypes.CDLL:
    """The shared library of a source, compiled now if it has not been before.

    Args:
        source: a file of ``native/``.

    Raises:
        GptDistError: it cannot be had here; says why in one line.
    """
    reason = unavailable()
    if reason:
        raise GptDistError(reason)
    try:
        return ctypes.CDLL(str(build(source)))
    except (OSError, subprocess.SubprocessError) as error:
        details = getattr(error, "stderr", None) or str(error)
        raise GptDistError(f"building {source} failed: {details.strip().splitlines()[0]}") from None


def unavailable() -> str | None:
    """Why this machine cannot build or run the kernels; None where it can."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    missing = [feature for feature in FEATURES if feature not in flags]
    if missing:
        return f"this CPU has no {missing[0]}"
    return None if _compiler() else "there is no C++ compiler (g++)"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")


def build(source: str) -> Path:
    """Path of the shared library of a source; compiles it if it has not been compiled before."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    options = [*FLAGS, *VECTORS]
    settings = _compiler(), options
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
            command = [str(_compiler()), *options, str(SOURCES / source), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            built.replace(path)
    return path
