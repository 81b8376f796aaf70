"""The frame around every endpoint: the gate, the body, errors, the log line, callers that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from grpc import StatusCode
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from serve.api.callers import caller
from serve.api.gate import Gate
from serve.api.rpc import REQUEST_ID, call_record, current, log_call, note_failure
from serve.api.status import StatusError, invalid
from serve.http import errors

JSON = "application/json"
EVENTS = "text/event-stream"


@dataclass
class Reply:
    """A whole answer."""

    content: bytes
    status: int = 200
    kind: str = JSON
    headers: dict[str, str] | None = None

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
        """A value as JSON."""
        return cls(encode(value), status, headers=headers)


Events = AsyncGenerator[bytes, None]
Behaviour = Callable[[bytes], Awaitable[Reply | Events]]
"""Answers a request with this body: at once, or piece by piece."""


def encode(value: Any) -> bytes:
    """JSON, in one line of UTF-8."""
    return orjson.dumps(value)


async def answer(
    name: str, behaviour: Behaviour, gate: Gate, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer one request. If the caller leaves, the work is cancelled at once.

    Args:
        name: of the endpoint, for metrics and the log: ``POST /v1/completions``.
        behaviour: answers.
        gate: admits.
        scope: of the request (ASGI).
        receive: its body, and that the caller has left.
        send: takes the answer.
    """
    began = time.monotonic()
    head = Headers(scope=scope)
    record = call_record(head.get(REQUEST_ID, ""), gate)
    current.set(record)
    client = scope.get("client")
    peer = f"{client[0]}:{client[1]}" if client else ""
    # Of two ends of a body a proxy may believe the other one, and take what follows for a request
    # of somebody else.
    ambiguous = "content-length" in head and "transfer-encoding" in head
    writer = _Writer(send, record.request_id, last=ambiguous)
    code = StatusCode.CANCELLED
    entered = False
    try:
        caller.set(gate.enter(name, dict(head), peer))
        entered = True
        if ambiguous:
            raise invalid("", "Content-Length and Transfer-Encoding exclude each other")
        body = await _body(receive, gate, int(head.get("content-length", 0)))
        work = asyncio.create_task(_work(behaviour, body, writer))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                code = StatusCode.OK
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
    except _Left:
        pass
    except Exception as error:
        status = note_failure(gate, name, error, record)
        code = status.code
        await writer.fail(status)
    finally:
        if entered:
            gate.leave(name, caller.get())
        log_call(gate, name, code, began, peer, record, head)


class _Left(Exception):
    """The caller left before its request was complete."""


class _Writer:
    """Sends an answer, which may fail before or after its first byte.

    Args:
        send: takes it (ASGI).
        request_id: for its head.
        last: whether the connection closes after it.
    """

    def __init__(self, send: Send, request_id: str, last: bool) -> None:
        self._send, self._request_id, self._last = send, request_id, last
        self.started = False

    async def whole(self, reply: Reply) -> None:
        length = {"content-length": str(len(reply.content))}
        await self.start(reply.status, reply.kind, length | (reply.headers or {}))
        await self.more(reply.content, last=True)

    async def start(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.started = True
        fields = {"content-type": kind, REQUEST_ID: self._request_id, **headers}
        if self._last:
            fields["connection"] = "close"
        pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def more(self, data: bytes, last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def fail(self, error: StatusError) -> None:
        """Send an error: as the answer, or as the last event of a stream."""
        content = errors.body(error)
        if self.started:
            await self.more(b"data: " + encode(content) + b"\n\n", last=True)
        else:
            await self.whole(Reply.json(content, errors.status_of(error), errors.headers(error)))


async def _work(behaviour: Behaviour, body: bytes, writer: _Writer) -> None:
    reply = await behaviour(body)
    if isinstance(reply, Reply):
        await writer.whole(reply)
        return
    async with aclosing(reply) as events:
        async for event in events:  # a failure before the first one has a status of its own
            if not writer.started:
                await writer.start(200, EVENTS, {"cache-control": "no-store"})
            await writer.more(event)
    await writer.more(b"", last=True)


async def _body(receive: Receive, gate: Gate, declared: int) -> bytes:
    """Read the body. One that is too long is refused by its declared length, before it is read.

    Raises:
        StatusError: it is too long, or slow to arrive.
        _Left: the caller left.
    """
    gate.check_size(declared)
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(gate.message_seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Left
                part = message.get("body", b"")
                size += len(part)
                gate.check_size(size)
                parts.append(part)
                more = message.get("more_body", False)
    except TimeoutError:
        raise StatusError(
            StatusCode.DEADLINE_EXCEEDED,
            f"no complete body within {gate.message_seconds:g} s",
            "NO_MESSAGE",
        ) from None
    return b"".join(parts)


async def _gone(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
