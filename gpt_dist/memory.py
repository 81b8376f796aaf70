"""How this process gets its memory."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt`` (malloc.h)."""


@cache
def keep_freed_memory() -> None:
    """Let the C library hold on to freed memory instead of returning it to the system.

    A training step on a CPU allocates and frees the same large tensors over and over. By default
    glibc maps each anew, and the system clears its pages one fault at a time: 204,000 faults and
    a quarter of a second for a 124M step of 1,024 tokens. Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
