"""Connections that say too little, and too many of them."""

from __future__ import annotations

import asyncio

from serve.http.listener import Listener, _Protocol
from tests.serve.conftest import PATIENCE


class Hurried(_Protocol):
    head_seconds = 0.3


class Few(_Protocol):
    most = 3


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
        listener = Listener(application, "127.0.0.1", 0, protocol=Few)
        kept = []
        for _ in range(Few.most):
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


class Patient(_Protocol):
    refused_seconds = 2 * PATIENCE


async def refuse(scope, receive, send):  # type: ignore[no-untyped-def]
    """Answers without reading the body."""
    await send({"type": "http.response.start", "status": 413, "headers": []})
    await send({"type": "http.response.body"})


def test_what_is_sent_after_a_refusal_is_read_slowly() -> None:
    async def run() -> int:
        listener = Listener(refuse, "127.0.0.1", 0, protocol=Patient)
        length = 64 << 20
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % length)
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        sent = 0
        while sent < length:  # until the buffers of the system are full
            writer.write(bytes(1 << 20))
            try:
                await asyncio.wait_for(writer.drain(), 1)
            except TimeoutError:
                break
            sent += 1 << 20
        writer.transport.abort()
        await listener.close(1)
        return sent

    assert asyncio.run(run()) < 32 << 20


def test_a_connection_is_used_again_after_a_refusal() -> None:
    async def run() -> None:
        listener = Listener(refuse, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
            while await reader.readline() != b"\r\n":
                pass
            assert await reader.readline() == b"0\r\n"  # the end of an empty body in chunks
            assert await reader.readline() == b"\r\n"
            writer.write(bytes(1_000_000))
        writer.close()
        await listener.close(1)

    asyncio.run(run())
