"""Slow work of single calls, kept off the event loop so that other calls do not wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from serve.api.status import overloaded

LIGHT = 2048
"""Characters or tokens that the event loop handles itself: about a millisecond."""
MAX_WAITING = 64
LONGEST_REST = 0.1
"""Seconds."""

Result = TypeVar("Result")


class Heavy:
    """One thread for slow work. More threads would only compete for the interpreter lock.

    After each piece of work it rests as long as the piece took, so that the event loop and the
    engine have the interpreter to themselves half of the time.

    Args:
        most: pieces of work that may wait for the thread.
    """

    def __init__(self, most: int = MAX_WAITING) -> None:
        self.most, self.waiting = most, 0
        self._thread = ThreadPoolExecutor(1, "heavy")
        self._rested = 0.0
        """When it may work again."""

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """Run ``work``: directly if it is small, otherwise in the thread.

        Args:
            size: how much it is, in characters or tokens.
            work: does it.

        Raises:
            StatusError: RESOURCE_EXHAUSTED, as for a full queue.
        """
        if size <= LIGHT:
            return work()
        if self.waiting >= self.most:
            raise overloaded(1.0)
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)
        finally:
            self.waiting -= 1

    def _do(self, work: Callable[[], Result]) -> Result:
        time.sleep(max(0.0, self._rested - time.monotonic()))
        began = time.monotonic()
        try:
            return work()
        finally:
            ended = time.monotonic()
            self._rested = ended + min(ended - began, LONGEST_REST)
