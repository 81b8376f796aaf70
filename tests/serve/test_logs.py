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
    logging.getLogger("uvicorn.error").info("Started server process [1]")
    logging.getLogger("serve").info("hello", extra={"request_id": "7", "ms": 3})
    logging.getLogger("serve").handlers[0].close()
    line = capsys.readouterr().err
    assert line.endswith("Z info hello (request_id=7)\n"), line


@pytest.mark.usefixtures("_loggers")
def test_no_text_of_a_caller_is_a_line_or_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks of every kind, escape sequences, quotes, and more text than anybody reads."""
    set_up("plain", "info")
    log = logging.getLogger("serve")
    breaks = "\n\r\x0b\x0c\x1c\x85\u2028\u2029"
    for number, mark in enumerate([*breaks, "\x1b[2J", "\x9b2J", "\u202e", "\ud800", "\x00"]):
        forged = f"x{mark}2026-01-31T12:00:00Z info Generate OK"
        log.info("call %d", number, extra={"error": forged, "peer": "ipv4:127.0.0.1:5"})
        log.info("message %s", forged)
    log.info("pairs", extra={"error": 'a" code=OK (peer=x)'})
    log.info("long", extra={"error": "y" * 100_000})
    try:
        raise ValueError("first\n2026-01-31T12:00:00Z info forged")
    except ValueError:
        log.exception("failed")
    log.handlers[0].close()
    written = capsys.readouterr().err
    assert not set(written) & {*breaks[1:], "\x1b", "\x9b", "\u202e", "\ud800", "\x00"}
    head, _, trace = written.partition(" error failed\n")
    lines = head.split("\n")
    assert len(lines) == 2 * 13 + 3
    assert lines[0].endswith(
        r'info call 0 (error="x\n2026-01-31T12:00:00Z info Generate OK" peer=ipv4:127.0.0.1:5)'
    )
    assert lines[-3].endswith(r'info pairs (error="a\" code=OK (peer=x)")')
    assert len(lines[-2]) < 600
    assert lines[-2].endswith('y… (100000 characters)")')
    assert all(line.startswith("  | ") for line in trace.splitlines())


@pytest.mark.usefixtures("_loggers")
def test_json_lines_are_cut_too(capsys: pytest.CaptureFixture[str]) -> None:
    set_up("json", "info")
    log = logging.getLogger("serve")
    log.info("x" * 100_000, extra={"error": "a\nb" * 100_000, "ms": 3})
    log.handlers[0].close()
    [line] = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert record["error"].startswith("a\nb")
    assert record["ms"] == 3
    assert len(line) < 2000


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
