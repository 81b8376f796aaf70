"""Logging to stderr, as plain text or JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import re
import sys
import threading
import time
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    *("message", "asctime", "taskName"),
    "color_message",  # uvicorn's message again, for a terminal
}

MOST = 500
"""Maximum length of a logged value or message: callers choose some of them."""
_PLAIN = re.compile(r"[!#-'*-<>-~]+")
"""What needs no quotes: printable ASCII without spaces, quotes, parentheses and ``=``."""
_CONTROL = re.compile(
    r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u2028-\u202f\u2066-\u2069]"
)
"""Characters that could start a line, move the cursor or change the direction of the text."""


def cut(text: str) -> str:
    """The beginning of a text, with a mark where the rest is missing."""
    return text if len(text) <= MOST else f"{text[:MOST]}… ({len(text)} characters)"


def escape(text: str) -> str:
    """A text on one line: control characters as in a Python string."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def quote(value: Any) -> str:
    """Format a value for a plain line, so that it cannot look like several."""
    text = cut(str(value))
    return text if _PLAIN.fullmatch(text) else escape(json.dumps(text, ensure_ascii=False))


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class PlainFormatter(logging.Formatter):
    """``2026-01-31T12:00:00Z info message (request_id=…)``.

    Text from callers cannot forge a line: control characters are escaped, and the lines of a
    traceback begin with ``|``.
    """

    converter = time.gmtime  # type: ignore[assignment]  # as in the logging cookbook

    def __init__(self) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%SZ")

    def format(self, record: logging.LogRecord) -> str:
        extras = _extras(record)
        level, message = record.levelname.lower(), escape(cut(record.getMessage()))
        line = f"{self.formatTime(record, self.datefmt)} {level} {message}"
        shown = [f"{name}={quote(extras[name])}" for name in extras if name not in _IN_MESSAGE]
        if shown:
            line += f" ({' '.join(shown)})"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n  | {escape(part)}" for part in trace)
        return line


_IN_MESSAGE = frozenset({"method", "code", "ms"})


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, message, and the fields of the call."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": cut(record.getMessage()),
            **{
                name: cut(value) if isinstance(value, str) else value
                for name, value in _extras(record).items()
            },
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class BackgroundHandler(logging.handlers.QueueHandler):
    """Writes in a thread, so that a slow reader of the log does not block the event loop.

    Records that do not fit into the queue are dropped; their number is logged later.
    """

    def __init__(self, target: logging.Handler, capacity: int = 10_000) -> None:
        self.records: queue.Queue[logging.LogRecord | None] = queue.Queue(capacity)
        super().__init__(self.records)
        self.target, self.dropped = target, 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # it stays in this process

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.records.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        while (record := self.records.get()) is not None:
            self.target.handle(record)
            if self.records.empty():
                self._report_dropped()
        self._report_dropped()

    def _report_dropped(self) -> None:
        if self.dropped:
            text, self.dropped = f"{self.dropped} log records were dropped", 0
            self.target.handle(logging.LogRecord("serve", logging.WARNING, "", 0, text, None, None))

    def close(self) -> None:
        """Write the records in the queue, for about a second at most."""
        with contextlib.suppress(queue.Full):
            self.records.put(None, timeout=1)
        self._thread.join(1)
        super().close()


def set_up(style: str, level: str) -> None:
    """Send the log of the server and of the model code to stderr.

    Args:
        style: "plain" or "json".
        level: lowest level that is written.
    """
    target = logging.StreamHandler(sys.stderr)
    target.setFormatter(JsonFormatter() if style == "json" else PlainFormatter())
    handler = BackgroundHandler(target)
    wanted = logging.getLevelNamesMapping()[level.upper()]
    # uvicorn's starts and stops are ours, which are logged already.
    for name, least in (("serve", 0), ("gpt_dist", 0), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(max(wanted, least))
