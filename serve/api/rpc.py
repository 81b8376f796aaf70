"""The frame around every method: parsing, statuses with details, metrics and the log line.

If grpc parses the requests, bytes that are not a message end with INTERNAL or UNKNOWN, as if the
server were at fault. Therefore handlers receive bytes and parse them here.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from serve.api.status import DETAILS, StatusError, internal, invalid

if TYPE_CHECKING:  # it imports torch, which `python -m serve --help` does not need
    from serve.metrics import Metrics

log = logging.getLogger("serve")

REQUEST_ID = "x-request-id"
_VALID_ID = re.compile(r"[\x21-\x7e]{1,128}")


REJECTIONS = frozenset({"QUEUE_FULL", "DRAINING", "LOADING", "ENGINE_FAILED"})
"""Reasons (see `StatusError`) that concern the server's state, not the call."""


@dataclass
class CallRecord:
    """What the log line says about a call."""

    request_id: str
    notes: dict[str, Any] = field(default_factory=dict)


current: ContextVar[CallRecord] = ContextVar("current")
"""The call being answered."""


def note(**values: Any) -> None:
    """Add to the log line of the current call."""
    current.get().notes.update(values)


def deadline_of(context: Any, clock: Callable[[], float]) -> float | None:
    """When the caller gives up, in seconds of ``clock``; None if never."""
    left = context.time_remaining()
    return None if left is None or left > 1e9 else clock() + left


def method_handler(
    behaviour: Any, client_streaming: bool, server_streaming: bool, **options: Any
) -> Any:
    """Make grpc's handler for a method of this kind. Requests arrive as bytes."""
    request, response = (
        "stream" if streaming else "unary" for streaming in (client_streaming, server_streaming)
    )
    return getattr(grpc, f"{request}_{response}_rpc_method_handler")(behaviour, **options)


def generic_handler(service: ServiceDescriptor, implementation: object, metrics: Metrics) -> Any:
    """Register the methods of ``implementation`` that ``service`` declares.

    A unary method is ``async def Name(request, context) -> response``. A streaming method is an
    asynchronous generator. If the client streams, ``request`` is an asynchronous iterator.
    """
    handlers = {}
    for method in service.methods:
        behaviour = getattr(implementation, method.name)
        answer = _Answer(
            f"{service.full_name}/{method.name}",
            GetMessageClass(method.input_type),
            behaviour,
            metrics,
            requests_stream=method.client_streaming,
        )
        if inspect.isasyncgenfunction(behaviour) != method.server_streaming:
            kind = "an" if method.server_streaming else "no"
            raise TypeError(f"{method.full_name} must be {kind} asynchronous generator")
        handlers[method.name] = method_handler(
            answer.stream if method.server_streaming else answer.unary,
            method.client_streaming,
            method.server_streaming,
            response_serializer=lambda message: message.SerializeToString(),
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


class _Answer:
    """Calls one method."""

    def __init__(
        self,
        name: str,
        message: type[Message],
        behaviour: Any,
        metrics: Metrics,
        requests_stream: bool,
    ) -> None:
        self.name, self.message, self.behaviour = name, message, behaviour
        self.metrics, self.requests_stream = metrics, requests_stream

    async def unary(self, data: Any, context: Any) -> Message:
        """Answer with one message."""
        with self._frame(context) as frame:
            try:
                response: Message = await self.behaviour(self._request(data), context)
            except Exception as error:
                await frame.abort(error)
                raise  # not reached
            frame.code = grpc.StatusCode.OK
            return response

    async def stream(self, data: Any, context: Any) -> None:
        """Answer with many messages.

        They are written here instead of by grpc, so that a cancellation is always raised in this
        frame and the generator is closed before the frame ends.
        """
        with self._frame(context) as frame:
            answers = None
            try:
                answers = self.behaviour(self._request(data), context)
                async for response in answers:
                    try:
                        await context.write(response)
                    except Exception as error:  # the caller left, and CancelledError is late
                        log.debug("%s: cannot write: %r", self.name, error)
                        return
            except Exception as error:
                await frame.abort(error)
            finally:
                if answers is not None:
                    await answers.aclose()
            frame.code = grpc.StatusCode.OK

    def _frame(self, context: Any) -> _Frame:
        return _Frame(self.name, context, self.metrics)

    def _request(self, data: Any) -> Any:
        if not self.requests_stream:
            return self._parse(data)

        async def requests() -> AsyncIterator[Message]:
            async for item in data:
                yield self._parse(item)

        return requests()

    def _parse(self, data: bytes) -> Message:
        try:
            return self.message.FromString(data)
        except DecodeError:
            name = self.message.DESCRIPTOR.full_name
            raise invalid("", f"the request is not a valid {name}") from None


class _Frame:
    """From the arrival of a call to its log line."""

    def __init__(self, name: str, context: Any, metrics: Metrics) -> None:
        self.name, self.context, self.metrics = name, context, metrics
        self.code = grpc.StatusCode.CANCELLED
        self.began = time.monotonic()

    def __enter__(self) -> _Frame:
        given = dict(self.context.invocation_metadata() or ()).get(REQUEST_ID, "")
        valid = isinstance(given, str) and _VALID_ID.fullmatch(given)
        self.record = CallRecord(given if valid else uuid.uuid4().hex)
        self.context.set_trailing_metadata(((REQUEST_ID, self.record.request_id),))
        current.set(self.record)
        return self

    async def abort(self, error: Exception) -> None:
        """End the call with the status of an error; raises."""
        if not isinstance(error, StatusError):
            log.exception("%s failed", self.name, extra={"request_id": self.record.request_id})
            error = internal()
        self.code = error.code
        if error.reason in REJECTIONS:
            self.metrics.rejections.labels(error.reason.lower()).inc()
        self.record.notes["error"] = error.message
        trailing = ((DETAILS, error.details()), (REQUEST_ID, self.record.request_id))
        try:
            await self.context.abort(error.code, error.message, trailing)
        except grpc.aio.AbortError:
            raise
        except Exception:  # the caller has left
            raise asyncio.CancelledError from None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is asyncio.CancelledError and (self.context.time_remaining() or 1) <= 0:
            self.code = grpc.StatusCode.DEADLINE_EXCEEDED
        seconds = time.monotonic() - self.began
        self.metrics.calls.labels(self.name, self.code.name).inc()
        self.metrics.call_seconds.labels(self.name).observe(seconds)
        log.info(
            "%s %s %.1f ms",
            self.name,
            self.code.name,
            seconds * 1000,
            extra={
                "request_id": self.record.request_id,
                "method": self.name,
                "code": self.code.name,
                "ms": round(seconds * 1000, 3),
                "peer": self.context.peer(),
                **self.record.notes,
            },
        )
