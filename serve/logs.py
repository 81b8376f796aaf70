"""Log lines for people or for programs, on stderr."""

from __future__ import annotations

import json
import logging
import sys
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
    """One object a line: time, level, message, and what belongs to the call."""

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


def set_up(style: str, level: str) -> None:
    """Send the package's log to stderr.

    Args:
        style: "plain" or "json".
        level: least severity.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else PlainFormatter())
    logger = logging.getLogger("serve")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level.upper())
