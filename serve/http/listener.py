"""Listens for HTTP, in the event loop that serves gRPC too."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt_dist.errors import GptDistError

KEEP_ALIVE = 75
"""Seconds that an idle connection stays open."""
MAX_HEADER_BYTES = 1 << 16


MAX_CONNECTIONS = 4096
"""Each takes about 30 KB."""
HEAD_SECONDS = 30.0
REFUSED_SECONDS = 0.1
"""Between two reads of a body whose answer is out, each of up to 256 KB."""


class _Protocol(H11Protocol):
    """Closes connections beyond a number, and those that do not complete a request's head.

    A body that was refused is read on slowly, so that many of them do not keep the event loop busy.
    """

    most = MAX_CONNECTIONS
    head_seconds = HEAD_SECONDS
    refused_seconds = REFUSED_SECONDS
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            self.flow.pause_reading()
            self.loop.call_later(self.refused_seconds, self._read_on)
        if self.cycle is None or self.cycle.response_complete:
            self._expect()
        else:
            self._cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _expect(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # the server has its own
        yield


class Listener:
    """Serves an application on a port.

    Args:
        app: the application.
        host: the address.
        port: 0 picks a free one.
        context: for TLS; None serves in the clear.
        protocol: what speaks HTTP.

    Raises:
        GptDistError: the port is in use, or the address is not this machine's.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        context: ssl.SSLContext | None = None,
        protocol: type[H11Protocol] = _Protocol,
    ) -> None:
        host = host.strip("[]")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            # With the protocol's name, asyncio sets TCP_NODELAY. Else an answer waits for 40 ms.
            self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(2048)
        except OSError as error:
            raise GptDistError(
                f"cannot serve HTTP on {host}:{port}: {error.strerror or error}; "
                "choose another --http-port, or 0 for a free one"
            ) from None
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        config.load()
        config.ssl = context
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve([self._socket]))

    async def close(self, seconds: float) -> None:
        """Stop listening, and end open connections: at the latest after so many seconds."""
        self._server.should_exit = True
        self._server.config.timeout_graceful_shutdown = max(1, round(seconds))
        await asyncio.gather(self._task, return_exceptions=True)
