"""A terminal for tests: what a program shows there, line by line, scrollback included."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence

import pyte

LINES = 500
"""Enough that nothing scrolls off the screen."""

CTRL_C = b"\x03"

TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Makes the terminal its session's own, so that Ctrl-C reaches the program that follows."""


class Terminal:
    """A screen with a number of columns that follows control sequences, as a terminal does."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._screen = pyte.Screen(columns, LINES)
        self._screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.ByteStream(self._screen)

    def feed(self, data: bytes) -> None:
        self._stream.feed(data)

    @property
    def lines(self) -> list[str]:
        """All lines that are not empty; at most the columns long, the rest would be wrapped."""
        return [line.rstrip() for line in self._screen.display if line.strip()]

    @property
    def shows_cursor(self) -> bool:
        return not self._screen.cursor.hidden


class Session:
    """A program in the foreground of a terminal of its own.

    Args:
        command: what to start.
        columns: the terminal's width.
        env: the whole environment; the caller's by default.
    """

    def __init__(
        self, command: Sequence[str], columns: int, env: Mapping[str, str] | None = None
    ) -> None:
        self.terminal = Terminal(columns)
        self._keyboard, screen = pty.openpty()
        size = struct.pack("HHHH", LINES, columns, 0, 0)
        fcntl.ioctl(screen, termios.TIOCSWINSZ, size)
        clean = {k: v for k, v in (env or os.environ).items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *command],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            env=clean | {"TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(screen)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._keyboard, 65536)
            except OSError:  # the last process that had the terminal open has ended
                return
            self.terminal.feed(data)

    def type(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    def wait(self, timeout: float = 240) -> int:
        """Wait until no process has the terminal open any more; the program's exit status."""
        try:
            status = self.process.wait(timeout)
            self._reader.join(timeout)
        finally:
            self.process.kill()
            os.close(self._keyboard)
        return status
