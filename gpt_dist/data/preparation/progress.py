"""Progress of long work: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_SECONDS = 10.0


class WorkProgress:
    """Progress of reading and tokenising text; a context manager. Writes to standard error.

    Args:
        title: names the work in a word or two.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._begin = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[figures]}"),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self._title, total=1.0, figures="")
            self._bar.start()
        return self

    def update(self, done: float, documents: int, tokens: int | None = None) -> None:
        """Show the progress.

        Args:
            done: share of the work, 0 to 1.
            documents: so far.
            tokens: so far; their rate is shown.
        """
        now = time.monotonic()
        if self._first is None:  # work of an earlier attempt must not count towards the speed
            self._first = done, tokens or 0
        figures = f"{documents:,} documents"
        if tokens is not None:
            rate = (tokens - self._first[1]) / max(1e-3, now - self._begin)
            figures += f"  {_short(rate)} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=self._title, figures=figures)
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            share = done - self._first[0]
            left = (now - self._begin) / share * (1 - done) if share > 0 else None
            rest = f"  {_clock(left)} left" if left is not None else ""
            print(f"{self._title} {done:.0%}  {figures}{rest}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Show what the work waits for."""
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text)
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            print(text, file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
