"""Calls that are cancelled, expire or lose their connection leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from typing import Any

import grpc
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.client import build_request
from serve.client.requests import stream_request
from tests.serve.conftest import Clock, HeldDecoder, StartServer, errors, wait_until
from tests.serve.soak import Leaks

COUNT = 10_000 if os.environ.get("SOAK") else 1000
GONE = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


async def interrupted(channel: grpc.aio.Channel, draw: random.Random) -> grpc.StatusCode | None:
    """Make a random call, abandon it at a random moment; returns the code it ended with."""
    stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    prompt = [draw.randrange(1, 200) for _ in range(draw.choice((1, 30, 140)))]
    options: dict[str, Any] = {
        "max_new_tokens": draw.randint(1, 20),
        "n": draw.choice((1, 1, 3)),
        "stop_sequences": ["e"] if draw.random() < 0.3 else [],
        "ignore_eos": True,
    }
    request = build_request(prompt, **options)
    kind = draw.randrange(4)
    timeout = draw.uniform(0.0005, 0.03) if draw.random() < 0.3 else 60
    patience = draw.choice((0, draw.uniform(0, 0.005), draw.uniform(0, 0.03), 60))
    if kind == 0:
        call: Any = stub.Generate(request, timeout=timeout)
    elif kind == 1:
        call = stub.GenerateStream(stream_request(prompt, **options), timeout=timeout)
    elif kind == 2:
        call = stub.GenerateBatch([api.GenerateBatchRequest(request=request)] * 3, timeout=timeout)
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
    if await call.details() == "Internal error from Core":
        return grpc.StatusCode.CANCELLED  # grpcio's own, for a bidirectional call as it begins
    return await call.code()


@pytest.mark.slow
def test_interrupted_calls_leave_nothing(
    start: StartServer, model: GPT, caplog: pytest.LogCaptureFixture
) -> None:
    # Steps take long enough for some deadlines to pass, whatever the machine.
    decoder = HeldDecoder(Decoder(model, max_slots=4, dtype="fp32"), pause=0.0005)
    server = start(decoder, max_queue=300, prefill_chunk=32)
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

    # The heaps of grpcio's threads grow during the first thousands of calls (measured with
    # 100,000 calls to one server: 4 MB during the first 20,000, none after that).
    asyncio.run(storm(max(300, COUNT // 4)))
    leaks = Leaks(server)
    codes.clear()
    asyncio.run(storm(COUNT))
    leaks.check("gRPC: calls abandoned at random moments", codes)
    # Each of the three endings occurred, and no other. What could not be done before its deadline
    # may have been refused.
    codes.pop("RESOURCE_EXHAUSTED", None)
    assert set(codes) == {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}, codes
    assert min(codes.values()) > COUNT / 50, codes
    assert errors(caplog) == []
    # The server still answers.
    with grpc.insecure_channel(server.target) as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        answer = stub.Generate(build_request([1], max_new_tokens=5, ignore_eos=True))
        assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("phase", ["queued", "prefilling", "first token", "mid-stream"])
@pytest.mark.parametrize("way", ["cancel", "deadline", "disconnect"])
def test_the_slot_is_free_within_one_step(
    start: StartServer, model: GPT, phase: str, way: str
) -> None:
    """With a decoder that runs step by step: the step under way ends, then the slot is free."""
    decoder, clock = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32")), Clock()
    server = start(decoder, clock, prefill_chunk=16)
    request = stream_request([1] * 100, max_new_tokens=59, ignore_eos=True)
    channel = grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)])
    others = grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)])
    decoder.hold()
    blocker = None
    if phase == "queued":
        blocker = GenerationServiceStub(others).GenerateStream(request)  # type: ignore[no-untyped-call]
        wait_until(lambda: decoder.held)
    stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    call = stub.GenerateStream(request, timeout=300)
    others_load = 0 if blocker is None else 1
    wait_until(lambda: len(server.scheduler.jobs) == others_load + 1)
    chunks = 7  # of 16 tokens, for a prompt of 99; the last token belongs to the first step
    decoder.allow(
        {"queued": 0, "prefilling": 2, "first token": chunks + 1, "mid-stream": chunks + 4}[phase]
    )
    wait_until(lambda: decoder.held)
    if phase in ("first token", "mid-stream"):
        assert len(next(call).token_ids) >= 1
    if way == "deadline":
        clock.now += 301
    else:
        call.cancel() if way == "cancel" else channel.close()
        wait_until(lambda: server.open_calls == others_load)
    assert len(server.scheduler.jobs) == others_load + 1
    before = decoder.calls
    decoder.allow(1)
    wait_until(lambda: len(server.scheduler.jobs) == others_load)
    assert decoder.calls == before + 1
    decoder.release()
    if way == "deadline":
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    if blocker is not None:
        blocker.cancel()
    server.wait_at_rest()


def test_a_vanished_client_is_noticed(start: StartServer, model: GPT) -> None:
    """A connection that breaks off without a goodbye, as when a process crashes."""
    decoder = HeldDecoder(Decoder(model, max_slots=4, dtype="fp32"))
    server = start(decoder)

    async def run() -> None:
        # A proxy whose connections can be reset.
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
        decoder.hold()
        call = stub.GenerateStream(stream_request([1], max_new_tokens=150, ignore_eos=True, n=3))
        decoder.allow(2)
        await call.read()
        assert len(server.scheduler.jobs) == 3
        for writer in writers:
            # A reset, not a close.
            linger = bytes([1, 0, 0, 0, 0, 0, 0, 0])
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        await asyncio.to_thread(wait_until, lambda: server.open_calls == 0)
        decoder.release()
        await asyncio.to_thread(server.wait_at_rest)
        assert decoder.calls < 10
        await channel.close()
        proxy.close()

    asyncio.run(run())
