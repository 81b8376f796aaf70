"""The frame around every method: the gate, parsing, statuses with details, metrics, the log line.

If grpc parses requests, malformed bytes end with INTERNAL or UNKNOWN, as if the server were at
fault. If grpc reads the request of a unary call, callers without a token are refused
only after they have sent it, and messages that are too long are not logged. Handlers therefore
receive a stream of bytes, which they read and parse here.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from serve.api.callers import caller
from serve.api.gate import OPEN_SERVICES, Gate
from serve.api.status import DETAILS, StatusError, internal, invalid
from serve.phases import Phase

log = logging.getLogger("serve")

PACKAGE = "gpt_dist.v1"
"""Its requests may have known fields only."""
REQUEST_ID = "x-request-id"
_VALID_ID = re.compile(r"[\x21-\x7e]{1,128}")

LONG_MESSAGE = 1 << 14
"""Messages of at least this many bytes are parsed one at a time: each takes milliseconds if it
holds token ids."""
UNKNOWN = "unknown"
"""Name of unknown methods in the metrics and the log."""

REJECTIONS = frozenset(
    {
        "QUEUE_FULL", "DRAINING", "LOADING", "ENGINE_FAILED", "TOO_MANY_CALLS", "TOO_MANY_WATCHES",
        "CALLER_RUNNING_LIMIT", "CALLER_WAITING_LIMIT", "DEADLINE_UNREACHABLE",
        "UNAUTHENTICATED", "UNKNOWN_METHOD", "MESSAGE_TOO_LARGE", "NO_MESSAGE",
    }
)  # fmt: skip
"""Reasons (see `StatusError`) that the metrics count as rejections."""


@dataclass
class CallRecord:
    """What the log line says about a call."""

    request_id: str
    notes: dict[str, Any] = field(default_factory=dict)
    phases: list[Phase] | None = None
    """The parts of its outputs; None if calls are not traced."""


current: ContextVar[CallRecord] = ContextVar("current")
"""The call being answered."""


def note(**values: Any) -> None:
    """Add to the log line of the current call."""
    current.get().notes.update(values)


def seconds_left(context: Any) -> float | None:
    """Seconds until the caller gives up; None if it never does."""
    left: float | None = context.time_remaining()
    return None if left is None or left > 1e9 else left


def generic_handler(service: ServiceDescriptor, implementation: object, gate: Gate) -> Any:
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
            gate,
            requests_stream=method.client_streaming,
        )
        if inspect.isasyncgenfunction(behaviour) != method.server_streaming:
            kind = "an" if method.server_streaming else "no"
            raise TypeError(f"{method.full_name} must be {kind} asynchronous generator")
        kind_of_handler = (
            grpc.stream_stream_rpc_method_handler
            if method.server_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        handlers[method.name] = kind_of_handler(
            answer.stream if method.server_streaming else answer.unary,
            response_serializer=lambda message: message.SerializeToString(),
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


class UnknownMethods(grpc.GenericRpcHandler):  # type: ignore[misc,type-arg]
    """Answers calls to unknown methods. Register it last."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def service(self, details: Any) -> Any:
        async def refuse(requests: Any, context: Any) -> None:
            with _Frame(UNKNOWN, context, self._gate) as frame:
                frame.record.notes["called"] = details.method
                try:
                    frame.enter()
                    raise StatusError(
                        grpc.StatusCode.UNIMPLEMENTED, "no such method", "UNKNOWN_METHOD"
                    )
                except StatusError as error:
                    await frame.abort(error)

        return grpc.stream_stream_rpc_method_handler(refuse)


class _Answer:
    """Calls one method."""

    def __init__(
        self,
        name: str,
        message: type[Message],
        behaviour: Any,
        gate: Gate,
        requests_stream: bool,
    ) -> None:
        self.name, self.message, self.behaviour = name, message, behaviour
        self.gate, self.requests_stream = gate, requests_stream

    async def unary(self, data: Any, context: Any) -> Message:
        """Answer with one message."""
        with _Frame(self.name, context, self.gate) as frame:
            try:
                frame.enter()
                response: Message = await self.behaviour(await self._request(data, frame), context)
            except asyncio.CancelledError:
                await frame.cut_off()
                raise
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
        with _Frame(self.name, context, self.gate) as frame:
            answers = None
            try:
                frame.enter()
                answers = self.behaviour(await self._request(data, frame), context)
                async for response in answers:
                    try:
                        await context.write(response)
                    except Exception as error:  # the caller left, and CancelledError is late
                        log.debug("%s: cannot write: %r", self.name, error)
                        return
            except asyncio.CancelledError:
                await frame.cut_off()
                raise
            except Exception as error:
                await frame.abort(error)
            finally:
                if answers is not None:
                    await answers.aclose()
            frame.code = grpc.StatusCode.OK

    async def _request(self, data: Any, frame: _Frame) -> Any:
        if not self.requests_stream:
            request = await self._message(await self._first(data))
            frame.accepted = True
            return request
        frame.accepted = True

        async def requests() -> AsyncIterator[Message]:
            async for item in data:
                yield await self._message(item)

        return requests()

    async def _first(self, data: Any) -> bytes:
        """The only message of a unary call."""
        try:
            async with asyncio.timeout(self.gate.message_seconds):
                async for item in data:
                    return bytes(item)
        except TimeoutError:
            raise StatusError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"no message within {self.gate.message_seconds:g} s",
                "NO_MESSAGE",
            ) from None
        raise StatusError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "no message arrived: it is far too long, or the caller disconnected",
            "NO_MESSAGE",
        )

    async def _message(self, data: bytes) -> Message:
        self.gate.check_size(len(data))
        if len(data) < LONG_MESSAGE:
            return self._parse(data)
        async with self.gate.parsing:
            began = time.monotonic()
            request = self._parse(data)
            # Short calls run in between: long messages get at most half of the loop's time.
            await asyncio.sleep(time.monotonic() - began)
        return request

    def _parse(self, data: bytes) -> Message:
        try:
            request = self.message.FromString(data)
            if self.message.DESCRIPTOR.file.package == PACKAGE:
                self._refuse_unknown_fields(request, data)
        except DecodeError:
            name = self.message.DESCRIPTOR.full_name
            raise invalid("", f"the request is not a valid {name}") from None
        return request

    def _refuse_unknown_fields(self, request: Message, data: bytes) -> None:
        """Refuse options that this server would ignore.

        Raises:
            StatusError: INVALID_ARGUMENT.
        """
        before = request.ByteSize()
        request.DiscardUnknownFields()  # type: ignore[attr-defined]
        excess = before - request.ByteSize()
        if not excess:
            return
        # To list them takes long if there are many.
        original = self.message.FromString(data)
        unknown: Any = UnknownFieldSet(original) if excess < 1000 else ()
        place = f"field {unknown[0].field_number}" if len(unknown) else "a part with a field"
        raise StatusError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{request.DESCRIPTOR.name} has {place} that this server does not know: the client "
            f"was made for another version of {PACKAGE}",
            "UNKNOWN_FIELD",
        )


def call_record(given: Any, gate: Gate) -> CallRecord:
    """The record of a call with the request id that its caller gave, if that is fit for a log."""
    valid = isinstance(given, str) and _VALID_ID.fullmatch(given)
    phases: list[Phase] | None = None if gate.tracer is None else []
    return CallRecord(given if valid else uuid.uuid4().hex, phases=phases)


def note_failure(gate: Gate, name: str, error: Exception, record: CallRecord) -> StatusError:
    """Count and note a call's failure, an unexpected one with its traceback; returns its status."""
    if not isinstance(error, StatusError):
        log.exception("%s failed", name, extra={"request_id": record.request_id})
        error = internal()
    if error.reason in REJECTIONS:
        gate.refused(error.reason)
    record.notes["error"] = error.message
    return error


def log_call(
    gate: Gate,
    name: str,
    code: grpc.StatusCode,
    began: float,
    peer: str,
    record: CallRecord,
    metadata: Mapping[str, Any],
) -> None:
    """Count a call that has ended, write its line to the log, and trace it."""
    seconds = time.monotonic() - began
    gate.metrics.calls.labels(name, code.name).inc()
    gate.metrics.call_seconds.labels(name).observe(seconds)
    # Probes ask every few seconds, and each client watches: that is for --log-level debug.
    quiet = name.startswith(OPEN_SERVICES) and "error" not in record.notes
    if terms := caller.get().terms.name:
        record.notes = {"caller": terms, **record.notes}
    gate.metrics.caller_calls.labels(gate.metrics.caller(terms), code.name).inc()
    log.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %.1f ms",
        name,
        code.name,
        seconds * 1000,
        extra={
            "request_id": record.request_id,
            "method": name,
            "code": code.name,
            "ms": round(seconds * 1000, 3),
            "peer": peer,
            **record.notes,
        },
    )
    if gate.tracer is not None and record.phases is not None and not quiet:
        now = time.time_ns()
        notes = {"request_id": record.request_id, **record.notes}
        gate.tracer.call(name, now - int(seconds * 1e9), now, code, metadata, record.phases, notes)


class _Frame:
    """From the arrival of a call to its log line."""

    def __init__(self, name: str, context: Any, gate: Gate) -> None:
        self.name, self.context, self.gate = name, context, gate
        self.code = grpc.StatusCode.CANCELLED
        self.began = time.monotonic()
        self.metadata = dict(context.invocation_metadata() or ())
        self.peer = context.peer()  # grpc forgets it when the call has ended
        self._entered = False
        self.accepted = False
        """Whether the request was read and handed on."""

    def __enter__(self) -> _Frame:
        self.record = call_record(self.metadata.get(REQUEST_ID, ""), self.gate)
        self.context.set_trailing_metadata(((REQUEST_ID, self.record.request_id),))
        current.set(self.record)
        return self

    def enter(self) -> None:
        """Pass the gate.

        Raises:
            StatusError: it is closed to this call.
        """
        shown = b",".join(self.context.peer_identities() or ()).decode(errors="replace")
        caller.set(self.gate.enter(self.name, self.metadata, self.peer, shown))
        self._entered = True
        task = asyncio.current_task()
        assert task is not None
        self.gate.tasks.add(task)
        task.add_done_callback(self.gate.tasks.discard)

    async def cut_off(self) -> None:
        """End a cancelled call with a status, if the server and not the caller cancelled it."""
        if self.gate.closed:
            code = grpc.StatusCode.ABORTED if self.accepted else grpc.StatusCode.UNAVAILABLE
            await self.abort(StatusError(code, "the server is shutting down", "DRAINING"))

    async def abort(self, error: Exception) -> None:
        """End the call with the status of an error; raises."""
        status = note_failure(self.gate, self.name, error, self.record)
        self.code = status.code
        trailing = [(DETAILS, status.details()), (REQUEST_ID, self.record.request_id)]
        attempts = str(self.metadata.get("grpc-previous-rpc-attempts", "0"))
        wait = status.pushback(int(attempts[:3]) if attempts.isdecimal() else 0)
        if wait is not None:
            trailing.append(("grpc-retry-pushback-ms", str(wait)))
        try:
            await self.context.abort(status.code, status.message, tuple(trailing))
        except grpc.aio.AbortError:
            raise
        except Exception:  # the caller has left
            self.code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is asyncio.CancelledError and (self.context.time_remaining() or 1) <= 0:
            self.code = grpc.StatusCode.DEADLINE_EXCEEDED
        if self._entered:
            self.gate.leave(self.name, caller.get())
        log_call(self.gate, self.name, self.code, self.began, self.peer, self.record, self.metadata)
