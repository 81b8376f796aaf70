"""Statuses of failed calls, with google.rpc details."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "gpt_dist"
DETAILS = "grpc-status-details-bin"


MOST = 500
"""Characters of a message or field that are sent. Callers choose some of them, and metadata that is
too long is an error of its own."""


class StatusError(Exception):
    """Ends the call with this status.

    Args:
        code: the status code.
        message: one sentence for people.
        reason: UPPER_SNAKE_CASE for programs (``google.rpc.ErrorInfo``).
        field: the invalid field of the request (``google.rpc.BadRequest``).
        retry_after: when to try again, in seconds (``google.rpc.RetryInfo``).
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: str,
        *,
        field: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.reason = code, message[:MOST], reason
        self.field, self.retry_after = field[:MOST], retry_after

    @property
    def number(self) -> int:
        """The code as a number of google.rpc.Code."""
        number: int = self.code.value[0]
        return number

    def details(self) -> bytes:
        """A serialised ``google.rpc.Status``, for the trailing metadata."""
        parts: list[Any] = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)]
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message, reason=self.reason
            )
            parts.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(self.retry_after * 1e9))
            parts.append(error_details_pb2.RetryInfo(retry_delay=delay))
        packed = []
        for part in parts:
            packed.append(any_pb2.Any())
            packed[-1].Pack(part)
        status = status_pb2.Status(code=self.number, message=self.message, details=packed)
        return status.SerializeToString()


def invalid(field: str, message: str) -> StatusError:
    """INVALID_ARGUMENT that names the field."""
    return StatusError(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{field}: {message}" if field else message,
        "INVALID_FIELD" if field else "INVALID_MESSAGE",
        field=field,
    )


def unavailable(message: str, reason: str, retry_after: float = 1.0) -> StatusError:
    """UNAVAILABLE: the call had no effect, so it is safe to repeat."""
    return StatusError(grpc.StatusCode.UNAVAILABLE, message, reason, retry_after=retry_after)


def lost(message: str, began: bool) -> StatusError:
    """The engine failed or stopped. Only a call that had not begun is safe to repeat.

    A call that was being computed may be what broke the engine, so it is ABORTED: clients that
    repeat UNAVAILABLE must not carry it to the next server.
    """
    if began:
        return StatusError(grpc.StatusCode.ABORTED, message, "ENGINE_FAILED")
    return unavailable(message, "ENGINE_FAILED")


def overloaded(retry_after: float) -> StatusError:
    """RESOURCE_EXHAUSTED: the queue is full."""
    return StatusError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
        "QUEUE_FULL",
        retry_after=retry_after,
    )


def expired() -> StatusError:
    """DEADLINE_EXCEEDED: the server noticed before grpc did."""
    return StatusError(
        grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed", "DEADLINE_EXCEEDED"
    )


def internal() -> StatusError:
    """INTERNAL: a defect of the server; the log has the traceback."""
    return StatusError(grpc.StatusCode.INTERNAL, "internal error", "INTERNAL")
