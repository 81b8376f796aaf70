"""Connections that say too little, and too many of them."""

from __future__ import annotations

import asyncio

from serve.http.listener import Listener, _Protocol
from tests.serve.conftest import PATIENCE


class Hurried(_Protocol):
    most = 3
    head_seconds = 0.3


async def application(scope, receive, send):  # type: ignore[no-untyped-def]
    """Answers when the connection has been open for longer than a head may take."""
    await asyncio.sleep(2 * Hurried.head_seconds)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


async def closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(100), PATIENCE) == b""
    except ConnectionResetError:
        return True


def test_half_a_head_is_not_waited_for_and_a_slow_answer_is() -> None:
    async def run() -> None:
        listener = Listener(application, "127.0.0.1", 0, protocol=Hurried)
        whole, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        for start in (b"", b"GET / HTTP/1.1\r\nhos"):
            reader, other = await asyncio.open_connection("127.0.0.1", listener.port)
            other.write(start)
            assert await closed(reader)
            other.close()
        assert (await whole.readline()).startswith(b"HTTP/1.1 204")
        # The next head on the same connection has its time too.
        while await whole.readline() != b"\r\n":
            pass
        writer.write(b"GET / HT")
        assert await closed(whole)
        writer.close()
        await listener.close(1)

    asyncio.run(run())


def test_connections_are_bounded() -> None:
    async def run() -> None:
        listener = Listener(application, "127.0.0.1", 0, protocol=Hurried)
        kept = []
        for _ in range(Hurried.most):
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            kept.append((reader, writer))
        refused, other = await asyncio.open_connection("127.0.0.1", listener.port)
        assert await closed(refused)
        other.close()
        for reader, writer in kept:
            assert (await reader.readline()).startswith(b"HTTP/1.1 204")
            writer.close()
        await listener.close(1)

    asyncio.run(run())
