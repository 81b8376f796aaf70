"""Send large requests to every method of a server from many connections, as fast as it takes them.

    python benchmarks/flood.py grpc 127.0.0.1:50051 --bytes 4000000

`serving_rpc.py flood` starts this in a process of its own. It prints what the calls ended with.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
from flags import benchmark_parser

from gpt_dist.v1 import generation_service_pb2 as api
from serve import bench
from serve.client import AsyncClient, build_request

CONNECTIONS = 50
SERVICE = "/gpt_dist.v1.GenerationService/"
MODEL = "/gpt_dist.v1.ModelService/"


def messages(size: int) -> dict[str, bytes]:
    """For each gRPC method a valid message, or bytes, of about this size."""
    text = " the" * (size // 4 - 64)
    ids = [300] * (size // 2 - 64)  # two bytes each
    written, counted = build_request(text), build_request(ids)
    return {
        SERVICE + "Generate": written.SerializeToString(),
        SERVICE + "GenerateStream": counted.SerializeToString(),
        SERVICE + "GenerateBatch": api.GenerateBatchRequest(request=written).SerializeToString(),
        SERVICE + "Score": api.ScoreRequest(prompt=counted.prompt).SerializeToString(),
        SERVICE + "Tokenize": api.TokenizeRequest(text=text).SerializeToString(),
        SERVICE + "Detokenize": api.DetokenizeRequest(token_ids=ids).SerializeToString(),
        MODEL + "GetModelInfo": bytes(size),
        MODEL + "GetServerStatus": b"\xff" * size,
        "/grpc.health.v1.Health/Check": bytes(size),
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": bytes(size),
        "/no.such.Service/Method": bytes(size),
    }


def bodies(size: int) -> dict[str, bytes]:
    """The same for the paths of HTTP."""
    text, ids = " the" * (size // 4 - 64), [300] * (size // 5 - 64)
    return {
        "/v1/completions": json.dumps({"prompt": text}).encode(),
        "/v1/completions?ids": json.dumps({"prompt": ids}).encode(),
        "/v1/completions?list": json.dumps(
            {"prompt": [ids[:100]] * (len(ids) // 101), "n": 1000}  # refused when it is parsed
        ).encode(),
        "/tokenize": json.dumps({"prompt": text}).encode(),
        "/detokenize": json.dumps({"tokens": ids}).encode(),
        "/health": bytes(size),
        "/v1/models": bytes(size),
        "/nowhere": b"[" * size,
    }


async def flood_grpc(
    address: str, given: list[tuple[str, bytes]], until: float, ended: Counter[str]
) -> None:
    """One connection, which sends without a pause."""
    options = [
        ("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1),
        ("grpc.enable_retries", 0),
    ]  # fmt: skip
    async with grpc.aio.insecure_channel(address, options) as channel:
        while time.monotonic() < until:
            method, data = random.choice(given)
            call = channel.unary_stream(method)(data, timeout=30)
            try:
                async for _ in call:
                    pass
            except grpc.aio.AioRpcError:
                pass
            ended[(await call.code()).name] += 1


async def flood_http(
    address: str, given: list[tuple[str, bytes]], until: float, ended: Counter[str]
) -> None:
    """The same over HTTP."""
    host, port = address.split(":")
    writer = None
    while time.monotonic() < until:
        path, data = random.choice(given)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head.encode() + data)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            ended[answer.split()[1].decode()] += 1
            length = answer.split(b"content-length:")[1].split()[0]
            await reader.readexactly(int(length))
            last = b"connection: close" in answer
        except (OSError, asyncio.IncompleteReadError):
            ended["reset"] += 1
            last = True
        if last and writer is not None:
            writer.close()
            writer = None


async def flood(protocol: str, address: str, size: int, seconds: float) -> Counter[str]:
    """Flood from all connections; returns how the calls ended."""
    ended: Counter[str] = Counter()
    one, make = (flood_grpc, messages) if protocol == "grpc" else (flood_http, bodies)
    given = list(make(size).items())
    print("ready", flush=True)
    until = time.monotonic() + seconds
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds + 2):
            await asyncio.gather(*[one(address, given, until, ended) for _ in range(CONNECTIONS)])
    return ended


async def watched(
    address: str, http: str, seconds: float, streams: list[list[int]]
) -> dict[str, Any]:
    """Health checks over both protocols, and streams of these prompts, for so many seconds."""
    until = time.monotonic() + seconds
    checks: dict[str, list[float]] = {"grpc": [], "http": []}
    gaps: list[float] = []

    async def trickle(name: str, check: Callable[[], Awaitable[Any]]) -> None:
        while time.monotonic() < until:
            began = time.perf_counter()
            assert await check()
            checks[name].append(time.perf_counter() - began)
            await asyncio.sleep(0.02)

    async def listen(client: AsyncClient, prompt: list[int]) -> None:
        while time.monotonic() < until:
            last = None
            async for _ in client.stream(prompt, max_new_tokens=200, ignore_eos=True):
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now
                if time.monotonic() > until:
                    break

    async def ask() -> bool:
        return (await session.get(f"http://{http}/health")).is_success

    async with AsyncClient(address) as client, httpx.AsyncClient(timeout=30) as session:
        await asyncio.gather(
            trickle("grpc", client.health), trickle("http", ask),
            *[listen(client, prompt) for prompt in streams],
        )  # fmt: skip
    return {
        f"health_{name}_ms": bench.summary(times) | {"max": max(times) * 1000, "checks": len(times)}
        for name, times in checks.items()
    } | {"stream_gap_ms": bench.summary(gaps) | {"max": max(gaps) * 1000}}


def main() -> None:
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("protocol", choices=("grpc", "http"))
    parser.add_argument("address", help="host:port")
    parser.add_argument("--bytes", type=int, default=4_000_000, help="of each request")
    parser.add_argument("--seconds", type=float, default=30)
    arguments = parser.parse_args()
    os.nice(10)  # the flood would come from other machines: it leaves the cores to the server
    ended = asyncio.run(
        flood(arguments.protocol, arguments.address, arguments.bytes, arguments.seconds)
    )
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
