"""Kernels for GPUs in Triton.

A kernel's module imports Triton, so it is imported only when a tensor on a GPU first needs it.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

_log = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Whether Triton is installed; if not, the log says so once."""
    if importlib.util.find_spec("triton") is not None:
        return True
    _log.warning("training on a GPU without Triton, which is slower: it is not installed")
    return False
