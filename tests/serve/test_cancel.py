"""Cancel, deadline and disconnect in every phase leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import time
from typing import Any

import grpc
import psutil
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.client import build_request
from serve.client.requests import as_stream
from tests.serve.conftest import LiveServer, SlowDecoder, StartServer, errors

COUNT = 10_000 if os.environ.get("SOAK") else 1000
GONE = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


@pytest.fixture(scope="module")
def slow(model: GPT) -> SlowDecoder:
    return SlowDecoder(Decoder(model, max_slots=4, dtype="fp32"), 0.0005)


@pytest.fixture(scope="module")
def server(start: StartServer, slow: SlowDecoder) -> LiveServer:
    return start(slow, max_queue=300, prefill_chunk=32)


async def interrupted(channel: grpc.aio.Channel, draw: random.Random) -> grpc.StatusCode | None:
    """One call of any kind, given up at any moment; the code it ended with."""
    stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    request = build_request(
        [draw.randrange(1, 200) for _ in range(draw.choice((1, 30, 140)))],
        max_new_tokens=draw.randint(1, 20),
        n=draw.choice((1, 1, 3)),
        stop_sequences=["e"] if draw.random() < 0.3 else [],
        ignore_eos=True,
    )
    kind = draw.randrange(4)
    timeout = draw.uniform(0.0005, 0.03) if draw.random() < 0.3 else 60
    patience = draw.choice((0, draw.uniform(0, 0.005), draw.uniform(0, 0.03), 60))
    if kind == 0:
        call: Any = stub.Generate(request, timeout=timeout)
    elif kind == 1:
        call = stub.GenerateStream(as_stream(request), timeout=timeout)
    elif kind == 2:
        call = stub.GenerateBatch(api.GenerateBatchRequest(requests=[request] * 3), timeout=timeout)
    else:
        call = stub.Score(api.ScoreRequest(prompt=request.prompt), timeout=timeout)

    async def use() -> None:
        if kind in (0, 3):
            await call
            return
        pieces = draw.choice((1, 2, 5, 1000))
        async for _ in call:
            pieces -= 1
            if not pieces:
                call.cancel()
                return

    task = asyncio.create_task(use())
    try:
        await asyncio.wait({task}, timeout=patience)
        call.cancel()
        await task
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        pass
    return await call.code()


def memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.slow
def test_interrupted_calls_leave_nothing(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(1)
    codes: dict[str, int] = {}

    async def storm(count: int) -> None:
        async with grpc.aio.insecure_channel(server.target) as channel:
            places = asyncio.Semaphore(24)

            async def one() -> None:
                async with places:
                    code = await interrupted(channel, draw)
                    codes[code.name] = codes.get(code.name, 0) + 1

            await asyncio.gather(*[one() for _ in range(count)])

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    # The heaps of grpcio's threads grow over the first thousands of calls (100,000 in a row to one
    # server: 4 MB over the first 20,000, level after that).
    asyncio.run(storm(max(300, COUNT // 4)))
    assert server.at_rest()
    before, tasks_before = memory(), server.call(tasks())
    asyncio.run(storm(COUNT))
    assert server.at_rest()
    deadline = time.monotonic() + 10  # the last call's task ends a moment after its answer
    while server.call(tasks()) > tasks_before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert memory() - before < 20 << 20
    # All the endings that were meant to happen did, and no others.
    assert set(codes) == {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}, codes
    assert min(codes.values()) > COUNT / 50, codes
    assert errors(caplog) == []
    # And the server is as good as new.
    with grpc.insecure_channel(server.target) as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        answer = stub.Generate(build_request([1], max_new_tokens=5, ignore_eos=True))
        assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("phase", ["queued", "prefilling", "first token", "mid-stream"])
@pytest.mark.parametrize("way", ["cancel", "deadline", "disconnect"])
def test_the_slot_is_free_within_one_step(
    start: StartServer, model: GPT, phase: str, way: str
) -> None:
    """With a decoder that runs step by step: one tick after the server heard of it, all is free."""
    slow = SlowDecoder(Decoder(model, max_slots=1, dtype="fp32"), 0.02)
    server = start(slow, prefill_chunk=16)
    scheduler = server.scheduler
    queued = phase == "queued"
    channel = grpc.insecure_channel(server.target)
    other = grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)])
    request = as_stream(build_request([1] * 100, max_new_tokens=59, ignore_eos=True))
    blocker = None
    if queued:
        stub = GenerationServiceStub(other)  # type: ignore[no-untyped-call]
        blocker = stub.GenerateStream(request)
        next(blocker)
    timeout = 0.1 if way == "deadline" and phase in ("queued", "prefilling") else 60
    stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    if way == "deadline" and timeout == 60:
        timeout = 0.8  # all is done after 1.3 seconds at the least
    call = stub.GenerateStream(request, timeout=timeout)
    target = 2 if queued else 1
    while scheduler.load < target and call.is_active():
        time.sleep(0.001)
    if phase == "prefilling" and way != "deadline":
        while slow.length(0) < 32:
            time.sleep(0.001)
    elif phase in ("first token", "mid-stream"):
        for _ in range(1 if phase == "first token" else 4):
            next(call)
    if way == "cancel":
        call.cancel()
    elif way == "disconnect":
        channel.close()
    else:
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    ticks = slow.steps
    began = time.monotonic()
    while scheduler.load >= target:
        time.sleep(0.0005)
        assert time.monotonic() - began < 5
    # The step (or chunk) under way may end, and the one that was about to begin.
    assert slow.steps - ticks <= 2
    if blocker is not None:
        blocker.cancel()
    assert server.at_rest()


def test_a_vanished_client_is_noticed(server: LiveServer) -> None:
    """A connection that is cut without a goodbye, as by a crash."""

    async def run() -> None:
        # A proxy that can be cut.
        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)

        writers: list[asyncio.StreamWriter] = []
        pumps: list[asyncio.Task[None]] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far = await asyncio.open_connection("127.0.0.1", server.server.port)
            writers.append(far)
            pumps.append(asyncio.create_task(pump(reader, far)))
            pumps.append(asyncio.create_task(pump(far_reader, writer)))

        proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = proxy.sockets[0].getsockname()[1]
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.GenerateStream(
            as_stream(build_request([1], max_new_tokens=150, ignore_eos=True, n=3))
        )
        await call.read()
        assert server.scheduler.load == 3
        for writer in writers:
            # A reset, not a close.
            linger = bytes([1, 0, 0, 0, 0, 0, 0, 0])
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        assert server.at_rest(1)
        await channel.close()
        proxy.close()

    asyncio.run(run())
