"""Checks every call before its message is read: authentication and the number of open calls."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import grpc

from serve.api.callers import Caller, identify
from serve.api.status import StatusError
from serve.engine.callers import NO_LIMITS, Terms

if TYPE_CHECKING:  # it imports torch, which `python -m serve --help` does not need
    from serve.metrics import Metrics
    from serve.tracing import Tracer

OPEN_SERVICES = ("grpc.health.v1.Health/", "GET /health")
"""Services that need no token. Probes have none, and health reveals only the state."""
MAX_WATCHES = 4096
"""Maximum number of open calls of `OPEN_SERVICES`. Each takes about 25 KB."""
MAX_CALLS = 1024
RESERVED = 8
"""One place in so many is for callers that have few open calls."""
MAX_MESSAGE_BYTES = 1 << 19
MESSAGE_SECONDS = 30.0
"""How long a caller may take to send its first message."""


class Gate:
    """Admits calls, and counts those that are open.

    Args:
        metrics: counts refusals, by reason.
        find: what the caller with an ``authorization`` header may use, None if it may not call;
            without this function everybody may.
        usual: the limits of callers that have none of their own.
        max_calls: maximum number of open calls, besides those of `OPEN_SERVICES`.
        max_watches: maximum number of open calls of `OPEN_SERVICES`.
        max_message_bytes: maximum size of a message.
        message_seconds: how long a caller may take to send its first message.
    """

    def __init__(
        self,
        metrics: Metrics,
        find: Callable[[str], Terms | None] | None = None,
        *,
        usual: Terms = NO_LIMITS,
        max_calls: int = MAX_CALLS,
        max_watches: int = MAX_WATCHES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        message_seconds: float = MESSAGE_SECONDS,
    ) -> None:
        self.metrics, self._find, self._usual = metrics, find, usual
        self.max_message_bytes = max_message_bytes
        """Of gRPC, and of a body of HTTP. The server lowers it to what its model can use."""
        self.message_seconds = message_seconds
        self.max_calls, self.max_watches = max_calls, max_watches
        self.tasks: set[asyncio.Task[Any]] = set()
        """The open gRPC calls."""
        self.tracer: Tracer | None = None
        """Makes spans of calls."""
        self.closed = False
        """Whether `close` was called."""
        self.parsing = asyncio.Lock()
        """Held while a long message is parsed."""
        self.calls = self.watches = 0
        """How many are open."""
        self._open: Counter[str] = Counter()
        """Those of them that are not of `OPEN_SERVICES`, by caller."""

    def enter(
        self, method: str, metadata: Mapping[str, Any], peer: str = "", certificate: str = ""
    ) -> Caller:
        """Admit a call to ``package.Service/Method``. `leave` must be called once after it.

        Args:
            method: its name.
            metadata: the metadata or headers.
            peer: who is at the other end of the connection.
            certificate: whose certificate it has shown, or "".

        Raises:
            StatusError: UNAUTHENTICATED, or RESOURCE_EXHAUSTED.
        """
        free = method.startswith(OPEN_SERVICES)
        authorization, known = metadata.get("authorization", ""), None
        if self._find is not None and not free:
            known = self._find(authorization) if isinstance(authorization, str) else None
            if known is None:
                raise StatusError(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "no valid token: send `authorization: Bearer TOKEN`",
                    "UNAUTHENTICATED",
                )
        if free and self.watches >= self.max_watches:
            raise _full(self.max_watches, "TOO_MANY_WATCHES")
        who = identify(authorization, peer, certificate, known, self._usual)
        if not free and self.calls >= self.max_calls - self._reserved(who):
            raise _full(self.calls, "TOO_MANY_CALLS")
        self._add(free, 1, who)
        return who

    def _reserved(self, who: Caller) -> int:
        """Places that a caller with many open calls leaves to others."""
        places = self.max_calls // RESERVED
        return places if self._open[who.terms.account] >= places else 0

    def leave(self, method: str, who: Caller) -> None:
        """Note that a call of ``who`` that was admitted has ended."""
        self._add(method.startswith(OPEN_SERVICES), -1, who)

    def close(self) -> None:
        """Cancel the gRPC calls that are still open."""
        self.closed = True
        for task in list(self.tasks):
            task.cancel()

    def _add(self, free: bool, count: int, who: Caller) -> None:
        if free:
            self.watches += count
            return
        self.calls += count
        self._open[who.terms.account] += count
        if not self._open[who.terms.account]:
            del self._open[who.terms.account]

    def check_size(self, size: int) -> None:
        """Check the size of a message, in bytes, before it is parsed: that could take seconds.

        Raises:
            StatusError: RESOURCE_EXHAUSTED.
        """
        if size > self.max_message_bytes:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the request is too long: at most {self.max_message_bytes} bytes are accepted",
                "MESSAGE_TOO_LARGE",
            )

    def refused(self, reason: str) -> None:
        """Count a refusal."""
        self.metrics.rejections.labels(reason.lower()).inc()


def _full(most: int, reason: str) -> StatusError:
    return StatusError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"{most} calls are open", reason, retry_after=1.0
    )
