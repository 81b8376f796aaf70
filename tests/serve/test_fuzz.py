"""Malformed bytes: every call gets the right status, and the server survives."""

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
from gpt_dist.v1 import model_service_pb2 as model_api
from serve.client import Client, build_request
from serve.inference import grpc_service_pb2 as kserve_pb
from tests.serve.conftest import CONTEXT, PATIENCE, LiveServer, StartServer, errors
from tests.serve.soak import Leaks

COUNT = 100_000 if os.environ.get("SOAK") else 5_000
SERVICE = api.DESCRIPTOR.services_by_name["GenerationService"]
MODEL = model_api.DESCRIPTOR.services_by_name["ModelService"]
INFERENCE = kserve_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
VALID = {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}


@pytest.fixture(scope="module")
def server(start: StartServer, model: GPT) -> LiveServer:
    return start(Decoder(model, max_slots=8, dtype="fp32"), kserve=True)


def seeds() -> dict[str, list[bytes]]:
    """Valid messages for each method, to mutate."""
    rich = build_request(
        "to be", temperature=0.5, top_k=5, top_p=0.9, seed=3, n=2, logit_bias={1: 2.0, 7: -1.0},
        max_new_tokens=3, stop_sequences=["a", "bc"], stop_token_ids=[5], logprobs=True,
        top_logprobs=2, time_budget=5.0, repetition_penalty=1.2,
    )  # fmt: skip
    plain = build_request([1, 2, 3], max_new_tokens=2)
    score = api.ScoreRequest(prompt=rich.prompt, top_logprobs=2)
    infer = kserve_pb.ModelInferRequest(model_name="gpt2")
    infer.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    infer.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    for text in (b"to be", b'{"max_tokens": 3, "temperature": "0.5"}'):
        infer.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
    requests = [rich.SerializeToString(), plain.SerializeToString()]
    return {
        f"/{SERVICE.full_name}/Generate": requests,
        f"/{SERVICE.full_name}/GenerateStream": requests,
        f"/{SERVICE.full_name}/GenerateBatch": [
            api.GenerateBatchRequest(request=rich).SerializeToString()
        ],
        f"/{SERVICE.full_name}/Score": [score.SerializeToString()],
        f"/{SERVICE.full_name}/Tokenize": [api.TokenizeRequest(text="x y").SerializeToString()],
        f"/{SERVICE.full_name}/Detokenize": [
            api.DetokenizeRequest(token_ids=[1, 2]).SerializeToString()
        ],
        f"/{MODEL.full_name}/GetModelInfo": [b"", b"\n\x04gpt2"],
        f"/{MODEL.full_name}/GetServerStatus": [b""],
        f"/{INFERENCE.full_name}/ModelInfer": [infer.SerializeToString()],
        f"/{INFERENCE.full_name}/ModelMetadata": [b"\n\x04gpt2"],
        "/grpc.health.v1.Health/Check": [b"", b"\n\x03abc"],
    }


def mutate(data: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(6)
    if kind == 0 or not data:
        return draw.randbytes(draw.choice((0, 1, 3, 20, 300)))
    changed = bytearray(data)
    if kind == 1:
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    elif kind == 2:
        del changed[draw.randrange(len(changed)) :]
    elif kind == 3:
        at = draw.randrange(len(changed))
        changed[at:at] = draw.randbytes(draw.randint(1, 8))
    elif kind == 4:
        at = draw.randrange(len(changed))
        changed[at : at + draw.randint(1, 6)] = b""
    else:
        changed += draw.choice((data, draw.randbytes(5), b"\xff" * 11, b"\x0b" * 50))
    return bytes(changed)


@pytest.mark.slow
def test_malformed_messages_never_cause_internal_errors(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(2)
    methods = list(seeds().items())
    streaming = {"GenerateStream", "GenerateBatch"}
    codes: dict[str, int] = {}

    async def send(channel: grpc.aio.Channel, places: asyncio.Semaphore) -> None:
        async with places:
            method, examples = draw.choice(methods)
            data = mutate(draw.choice(examples), draw)
            if method.rpartition("/")[2] in streaming:
                call: Any = channel.unary_stream(method)(data, timeout=PATIENCE)
                try:
                    async for _ in call:
                        pass
                except grpc.aio.AioRpcError:
                    pass
            else:
                call = channel.unary_unary(method)(data, timeout=PATIENCE)
                await asyncio.wait({asyncio.ensure_future(call.code())})
            code = (await call.code()).name
            codes[code] = codes.get(code, 0) + 1
            if code not in VALID:
                raise AssertionError(f"{code} {await call.details()} for {method} {data!r}")

    async def run(total: int) -> None:
        async with grpc.aio.insecure_channel(server.target) as channel:
            places = asyncio.Semaphore(32)
            for start in range(0, total, 1000):
                count = min(1000, total - start)
                await asyncio.gather(*[send(channel, places) for _ in range(count)])

    asyncio.run(run(COUNT // 10))
    leaks = Leaks(server)
    codes.clear()
    asyncio.run(run(COUNT))
    leaks.check("gRPC: malformed messages", codes)
    assert sum(codes.values()) == COUNT
    assert codes["INVALID_ARGUMENT"] > COUNT / 4, codes
    assert codes["OK"] > COUNT / 20, codes
    assert errors(caplog) == []


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
GARBAGE = {
    "nothing": b"",
    "http/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls hello": bytes.fromhex("1603010200010001fc0303") + b"\0" * 64,
    "half a preface": PREFACE[:10],
    "preface and noise": PREFACE + bytes(range(256)) * 8,
    "frame of 16 MB": PREFACE + SETTINGS + bytes([255, 255, 255, 0, 0, 0, 0, 0, 1]),
    "data on stream 0": PREFACE + SETTINGS + bytes([0, 0, 4, 0, 0, 0, 0, 0, 0]) + b"abcd",
    "broken headers": PREFACE + SETTINGS + bytes([0, 0, 6, 1, 4, 0, 0, 0, 1]) + b"\xff" * 6,
    "window of 0": PREFACE + SETTINGS + bytes([0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    "endless ping": PREFACE + SETTINGS + (bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"12345678") * 500,
    "reset flood": PREFACE + SETTINGS
    + b"".join(bytes([0, 0, 4, 3, 0, 0, 0, 0, i, 0, 0, 0, 8]) for i in range(1, 200, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", GARBAGE)
def test_broken_framing_ends_only_that_connection(server: LiveServer, name: str) -> None:
    with Client(server.target) as client:
        for cut in (None, 1):
            with socket.create_connection(("127.0.0.1", server.server.port)) as connection:
                connection.settimeout(0.2)
                try:
                    connection.sendall(GARBAGE[name][:cut])
                    while connection.recv(4096):
                        pass
                except OSError:  # a timeout or a reset, both valid
                    pass
            assert client.health()
        assert client.generate([1], max_new_tokens=2).usage.completion_tokens <= 2


def frames(payload: bytes) -> bytes:
    """A hand-made HTTP/2 request with this body in its DATA frame."""
    path = b"/gpt_dist.v1.GenerationService/Generate"
    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"),
    ]  # fmt: skip
    block = b"".join(
        bytes([0, len(name)]) + name + bytes([len(value)]) + value for name, value in fields
    )
    headers = len(block).to_bytes(3, "big") + bytes([1, 4, 0, 0, 0, 1]) + block
    return PREFACE + SETTINGS + headers + len(payload).to_bytes(3, "big") + bytes(
        [0, 1, 0, 0, 0, 1]
    ) + payload  # fmt: skip


@pytest.mark.parametrize(
    "payload",
    [
        b"\0\0\0",  # half a length
        b"\0\xff\xff\xff\xff",  # a message of 4 GB
        b"\x01\0\0\0\x04abcd",  # compressed with nothing
        b"\x07\0\0\0\x01a",  # an unknown flag
        b"\0\0\0\0\x02a",  # shorter than announced
        b"\0\0\0\0\x01\xff" * 3,  # three messages for a unary call
    ],
)
def test_broken_grpc_framing(server: LiveServer, payload: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.server.port)) as connection:
        connection.settimeout(0.3)
        connection.sendall(frames(payload))
        try:
            while connection.recv(4096):
                pass
        except OSError:
            pass
    with Client(server.target) as client:
        assert client.health()
        full = client.generate([1] * (CONTEXT - 1), max_new_tokens=2, ignore_eos=True)
        assert full.usage.completion_tokens == 2
    server.wait_at_rest()
