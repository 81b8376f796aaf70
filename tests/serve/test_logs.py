"""Logging: one format for all lines, and no blocking of the event loop."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator

import pytest

from serve.logs import BackgroundHandler, set_up
from tests.serve.conftest import PATIENCE, wait_until

NAMES = ("serve", "gpt_dist")


@pytest.fixture
def _loggers() -> Iterator[None]:
    """Put the loggers back as they were."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("_loggers")
def test_every_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Including those of the model code: a log collector reads all of stderr."""
    set_up("json", "info")
    logging.getLogger("serve").info("hello %s", "you", extra={"request_id": "7"})
    logging.getLogger("serve").debug("not shown")
    logging.getLogger("gpt_dist.inference").warning("slow")
    try:
        raise ValueError("oh")
    except ValueError:
        logging.getLogger("serve").exception("failed")
    logging.getLogger("serve").handlers[0].close()
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [record["message"] for record in records] == ["hello you", "slow", "failed"]
    assert (records[0]["level"], records[0]["request_id"]) == ("info", "7")
    assert "ValueError: oh" in records[2]["traceback"]


@pytest.mark.usefixtures("_loggers")
def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    set_up("plain", "info")
    logging.getLogger("serve").info("hello", extra={"request_id": "7", "ms": 3})
    logging.getLogger("serve").handlers[0].close()
    line = capsys.readouterr().err
    assert line.endswith("Z info hello (request_id=7)\n"), line


def test_an_unread_log_blocks_nothing() -> None:
    """Records that do not fit into the queue are dropped and counted."""
    go, written = threading.Event(), []

    class Blocked(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            go.wait(PATIENCE)
            written.append(record.getMessage())

    handler = BackgroundHandler(Blocked(), capacity=4)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    for number in range(20):
        logger.info("%d", number)  # returns although nothing is written
    go.set()
    wait_until(lambda: "dropped" in "".join(written))
    handler.close()
    *kept, last = written
    assert kept == [str(number) for number in range(len(kept))]
    assert len(kept) in (4, 5)
    assert last == f"{20 - len(kept)} log records were dropped"
