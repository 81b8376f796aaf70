"""Stop requests: SIGTERM, SIGUSR1 and Ctrl-C set a flag that the training loop checks."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from gpt_dist.errors import is_rank_0

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Catches the stop signals inside its block; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        """The signal that came last, such as ``SIGTERM``; None before any."""
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether this process was asked to stop."""
        return self.name is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if number == signal.SIGINT and is_rank_0():
            with contextlib.suppress(RuntimeError):  # the signal came while this stream was written
                print(
                    "stopping with a checkpoint; Ctrl-C again stops at once",
                    file=sys.stderr,
                    flush=True,
                )
