"""What a server holds before and after a storm of calls, and the record of the long versions.

With ``SOAK`` the tests that use this make many more calls; with ``SOAK_JSON`` each appends a line
with its counts to that file (`benchmarks/soak.py` makes the record of them).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.serve.conftest import LiveServer, wait_until

MEMORY = 20 << 20
"""Bytes by which the process may grow."""


def note(test: str, seconds: float, **facts: Any) -> None:
    """Append a line to the record, if one is wanted."""
    if path := os.environ.get("SOAK_JSON"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"test": test, "seconds": round(seconds), **facts}) + "\n")


async def _tasks() -> int:
    return len(asyncio.all_tasks())


class Leaks:
    """Compares what a server at rest holds now with what it holds after the storm.

    Args:
        server: in this process, as its clients are.
    """

    def __init__(self, server: LiveServer) -> None:
        self.server, self.began = server, time.monotonic()
        self.process = psutil.Process()
        server.wait_at_rest()
        self.tasks, self.files = server.call(_tasks()), self.process.num_fds()
        self.memory = self._memory()

    def _memory(self) -> int:
        gc.collect()
        size: int = self.process.memory_info().rss
        return size

    def check(self, test: str, counts: Mapping[Any, int], memory: bool = True) -> None:
        """Fail if slots, calls, tasks, file descriptors or memory were kept; note the counts.

        Args:
            test: its name in the record.
            counts: how many calls ended in which way.
            memory: False where the test itself keeps what it sends.
        """
        seconds = time.monotonic() - self.began
        self.server.wait_at_rest()
        # A call's task and a closed connection's descriptor go a moment after the answer.
        wait_until(lambda: self.server.server.gate.calls == 0, "the calls to end")
        wait_until(lambda: self.server.call(_tasks()) <= self.tasks, "the tasks to end")
        wait_until(lambda: self.process.num_fds() <= self.files, "the descriptors to close")
        grown = self._memory() - self.memory
        assert not memory or grown < MEMORY, f"{grown >> 20} MB more"
        checked = ["slots", "calls", "tasks", "descriptors", *(["memory"] if memory else [])]
        note(
            test, seconds,
            ended={str(name): count for name, count in sorted(counts.items(), key=str)},
            nothing_kept_of=checked, grown_mb=round(grown / 1e6, 1),
        )  # fmt: skip
