"""Statuses of failed calls, with google.rpc details."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from gpt_dist.v1 import errors_pb2
from serve.engine.refusals import CallerFull, Refusal, TooLate

if TYPE_CHECKING:  # it imports torch
    from serve.engine.jobs import Lost

DOMAIN = "gpt_dist"
DETAILS = "grpc-status-details-bin"


MOST = 500
"""Characters of a message or field that are sent. Callers choose some of them, and metadata that is
too long is an error of its own."""


PASSING = ("QUEUE_FULL", "TOO_MANY_CALLS", "DEADLINE_UNREACHABLE")
"""Reasons of RESOURCE_EXHAUSTED that another server may not have. Limits of a caller are not among
them: more servers do not raise them."""
FIRST_WAIT, LONGEST_WAIT = 20, 1.0
"""Milliseconds until the first repetition; seconds at most until a later one."""


class StatusError(Exception):
    """Ends the call with this status.

    Args:
        code: the status code.
        message: one sentence for people.
        reason: for programs (``google.rpc.ErrorInfo``): a name of ``gpt_dist.v1.ErrorReason``
            without its prefix.
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
        errors_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}")  # undocumented: ValueError
        self.code, self.message, self.reason = code, message[:MOST], reason
        self.field, self.retry_after = field[:MOST], retry_after

    @property
    def number(self) -> int:
        """The code as a number of google.rpc.Code."""
        number: int = self.code.value[0]
        return number

    def pushback(self, attempts: int) -> int | None:
        """When the client should repeat the call, in milliseconds; -1: never; None: as it likes.

        At its first attempt it should try another server at once, later it should wait.

        Args:
            attempts: how often it has tried before.
        """
        if self.code != grpc.StatusCode.RESOURCE_EXHAUSTED:
            return None
        if self.reason not in PASSING:
            return -1
        return round(1000 * min(self.retry_after or 1.0, LONGEST_WAIT)) if attempts else FIRST_WAIT

    def details(self) -> bytes:
        """A serialised ``google.rpc.Status``, for the trailing metadata."""
        return self.status().SerializeToString()

    def status(self) -> status_pb2.Status:
        """The error with its details, as one message."""
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
        return status_pb2.Status(code=self.number, message=self.message, details=packed)


def invalid(field: str, message: str) -> StatusError:
    """INVALID_ARGUMENT that names the field."""
    return StatusError(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{field}: {message}" if field else message,
        "INVALID_FIELD" if field else "INVALID_MESSAGE",
        field=field,
    )


def unknown_model(given: str, served: str, field: str = "model") -> StatusError:
    """NOT_FOUND: the server serves another model."""
    return StatusError(
        grpc.StatusCode.NOT_FOUND,
        f"unknown model {given[:80]!r}; this server serves {served!r}",
        "UNKNOWN_MODEL",
        field=field,
    )


def other_weights(expected: str, version: str) -> StatusError:
    """FAILED_PRECONDITION: the weights are not of the version that the caller expects."""
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"the weights are of version {version!r}, not {expected[:80]!r}",
        "WEIGHTS_VERSION_MISMATCH",
        field="expected_weights_version",
    )


def too_large(field: str, size: int, limit: int) -> StatusError:
    """INVALID_ARGUMENT: a default client could not read the response."""
    return StatusError(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{field}: the response could have {size / 1e6:,.1f} MB, and gRPC clients read "
        f"{limit / 1e6:.1f} MB by default; ask for fewer outputs, tokens or log-probabilities, "
        "or stream",
        "RESPONSE_TOO_LARGE",
        field=field,
    )


def unavailable(message: str, reason: str, retry_after: float = 1.0) -> StatusError:
    """UNAVAILABLE: the call had no effect, so it is safe to repeat."""
    return StatusError(grpc.StatusCode.UNAVAILABLE, message, reason, retry_after=retry_after)


def lost(event: Lost, began: bool) -> StatusError:
    """The engine failed or stopped. Only a call that had not begun is safe to repeat.

    A call that had begun may have caused the failure, so it is ABORTED: clients repeat UNAVAILABLE,
    and would break the next server with it.

    Args:
        event: what the engine said.
        began: whether the computation of the call had begun.
    """
    reason = "DRAINING" if event.stopped else "ENGINE_FAILED"
    if began:
        return StatusError(grpc.StatusCode.ABORTED, event.message, reason)
    return unavailable(event.message, reason)


def overloaded(retry_after: float) -> StatusError:
    """RESOURCE_EXHAUSTED: the queue is full."""
    return StatusError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
        "QUEUE_FULL",
        retry_after=retry_after,
    )


def refused(error: Refusal, retry_after: float) -> StatusError:
    """RESOURCE_EXHAUSTED: the scheduler has no room for the work.

    Args:
        error: what it said.
        retry_after: seconds until there may be room.
    """
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    match error:
        case CallerFull(limit=limit, terms=terms):
            most = getattr(terms, limit)
            message = f"{terms.name or 'the caller'} may have {most} {limit} sequences"
            reason = f"CALLER_{limit.upper()}_LIMIT"
            return StatusError(code, message, reason, retry_after=retry_after)
        case TooLate(seconds=seconds):
            message = f"the answer would take at least {seconds:.3g} s, longer than its deadline"
            return StatusError(code, message, "DEADLINE_UNREACHABLE", retry_after=retry_after)
    return overloaded(retry_after)


def expired() -> StatusError:
    """DEADLINE_EXCEEDED: the server noticed before grpc did."""
    return StatusError(
        grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed", "DEADLINE_EXCEEDED"
    )


def internal() -> StatusError:
    """INTERNAL: a defect of the server; the log has the traceback."""
    return StatusError(grpc.StatusCode.INTERNAL, "internal error", "INTERNAL")
