"""Logging to stderr, as plain text or JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import sys
import threading
import time
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class PlainFormatter(logging.Formatter):
    """``2026-01-31T12:00:00Z info message (request_id=…)``."""

    converter = time.gmtime  # type: ignore[assignment]  # as in the logging cookbook

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(level)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")

    def format(self, record: logging.LogRecord) -> str:
        extras = _extras(record)
        record.level = record.levelname.lower()
        line = super().format(record)
        shown = (f"{name}={extras[name]}" for name in extras if name not in _IN_MESSAGE)
        return f"{line} ({' '.join(shown)})" if extras else line


_IN_MESSAGE = frozenset({"method", "code", "ms"})


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, message, and the fields of the call."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_extras(record),
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
    for name in ("serve", "gpt_dist"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
