"""How this process gets its memory."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from functools import cache

from gpt_dist.errors import GptDistError
from gpt_dist.ops import build

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
    library, which is told to keep what it has if it is glibc.
    """
    if sys.platform != "linux":
        return
    if not build.disabled():
        try:
            # Of no more than there is: what cannot fit is refused at once, by the C library.
            use_region(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except GptDistError as error:
            _log.warning("training takes a little more memory than it could: %s", error)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def use_region(size: int) -> None:
    """Take PyTorch's large CPU tensors from one region of addresses, from now on.

    Args:
        size: of the region in bytes; only what tensors have touched is memory.

    Raises:
        GptDistError: that cannot be had; says why.
    """
    install = build.load("allocator.cpp", features=()).install
    install.argtypes = [ctypes.c_size_t]
    if not install(size):
        raise GptDistError(f"the system gives no {size} bytes of addresses")
