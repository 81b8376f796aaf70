"""How this process gets its memory."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from functools import cache

from gpt_dist import kernels

_log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt`` (malloc.h)."""


@cache
def keep_freed_memory() -> None:
    """Hold on to freed memory instead of returning it to the system; for training on a CPU.

    A training step allocates and frees the same large tensors over and over. By default glibc maps
    each anew, and the system clears its pages one fault at a time: 204,000 faults and a quarter of
    a second for a 124M step of 1,024 tokens. PyTorch's large tensors get an allocator of ours,
    where there is a compiler for it (``native/allocator.cpp``); everything else is left to the C
    library, told to keep what it has. Other C libraries than glibc are left as they are.
    """
    if sys.platform != "linux":
        return
    use_region(2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def use_region(size: int) -> bool:
    """Take PyTorch's large CPU tensors from one region of addresses, from now on.

    Args:
        size: of the region in bytes; only what tensors have touched is memory.

    Returns:
        Whether that could be had.
    """
    if os.environ.get("GPT_DIST_KERNELS") == "0" or kernels.unavailable():
        return False
    try:
        install = ctypes.CDLL(str(kernels.build("allocator.cpp"))).install
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("tensors are left to the C library: %s", error)
        return False
    install.argtypes = [ctypes.c_size_t]
    return bool(install(size))
