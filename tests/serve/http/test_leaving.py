"""Callers that leave, in every phase, and the end of the server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import threading
from typing import Any

import httpx
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from tests.serve.conftest import (
    CONTEXT,
    PATIENCE,
    HeldDecoder,
    LiveServer,
    StartServer,
    errors,
    wait_until,
)
from tests.serve.http.conftest import openai, openai_client, url
from tests.serve.soak import Leaks

COUNT = 10_000 if os.environ.get("SOAK") else 400
LONG: dict[str, Any] = {"model": "", "prompt": [1], "max_tokens": 150}
IGNORE = {"extra_body": {"ignore_eos": True}}


def post(server: LiveServer, **fields: Any) -> socket.socket:
    """Send a request by hand; returns the open connection."""
    body = json.dumps({**LONG, "ignore_eos": True, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", server.server.http_port or 0))
    connection.settimeout(PATIENCE)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_frees_its_slot_within_a_step(
    start: StartServer, model: GPT, stream: bool
) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, http_port=0, stream_interval=0)
    # While it waits in the queue.
    decoder.hold()
    first, waiting = post(server, stream=stream), post(server, stream=stream)
    wait_until(lambda: len(server.scheduler.jobs) == 2)
    waiting.close()
    wait_until(lambda: server.open_calls == 1)
    # While it runs.
    decoder.allow(3)
    wait_until(lambda: decoder.held)
    first.close()
    wait_until(lambda: server.open_calls == 0)
    calls = decoder.calls
    decoder.release()
    server.wait_at_rest()
    assert decoder.calls <= calls + 1
    wait_until(lambda: server.server.metrics.cancelled._value.get() == 2)


def test_openai_cancels_by_closing_the_stream(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, http_port=0, stream_interval=0)
    decoder.hold()
    decoder.allow(3)
    stream = openai_client(server).completions.create(**LONG, **IGNORE, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: server.open_calls == 0)
    decoder.release()
    server.wait_at_rest()
    decoder.hold()
    with pytest.raises(openai.APITimeoutError):
        openai_client(server, timeout=0.2).completions.create(**LONG, **IGNORE)
    wait_until(lambda: server.open_calls == 0)
    decoder.release()
    server.wait_at_rest()


def test_a_slow_reader_delays_nobody(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=2, dtype="fp32"), http_port=0)
    slow = post(server, stream=True, logprobs=20, n=1)
    for _ in range(3):
        answer = httpx.post(f"{url(server)}/v1/completions", json={"prompt": "x"}, timeout=PATIENCE)
        assert answer.is_success
    wait_until(lambda: len(server.scheduler.jobs) == 0)
    text = b""
    while b"[DONE]" not in text:
        text += slow.recv(1 << 16)
    slow.close()


def test_what_fails_in_a_stream_is_an_error_to_the_client(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, http_port=0, stream_interval=0)
    decoder.hold()
    decoder.allow(3)
    stream = openai_client(server).completions.create(**LONG, **IGNORE, stream=True)
    next(iter(stream))
    decoder.error = RuntimeError("out of memory")
    decoder.release()
    with pytest.raises(openai.APIError, match="engine failed"):
        list(stream)
    with pytest.raises(openai.InternalServerError) as caught:
        openai_client(server).completions.create(**LONG)
    assert caught.value.status_code == 503


def test_draining_finishes_what_was_accepted(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, http_port=0, grace=PATIENCE)
    decoder.hold()
    texts: list[str] = []

    def ask() -> None:
        answer = openai_client(server).completions.create(**LONG, **IGNORE)
        texts.append(answer.choices[0].text)

    with httpx.Client(base_url=url(server), timeout=PATIENCE) as kept:
        assert kept.get("/health").is_success
        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: len(server.scheduler.jobs) == 1)
        drain = server.begin(server.server.drain())
        wait_until(lambda: server.server.service.draining)
        assert kept.get("/health").status_code == 503
        late = kept.post("/v1/completions", json={"prompt": "x"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        decoder.release()
        thread.join(PATIENCE)
        assert texts
        assert drain.result(PATIENCE)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url(server)}/health")


@pytest.mark.slow
def test_interrupted_calls_leave_nothing(
    start: StartServer, model: GPT, caplog: pytest.LogCaptureFixture
) -> None:
    """Thousands of calls that are abandoned at random moments."""
    decoder = HeldDecoder(Decoder(model, max_slots=4, dtype="fp32"), pause=0.0005)
    server = start(decoder, http_port=0, max_queue=300, prefill_chunk=32)
    draw = random.Random(1)
    ended = {"answered": 0, "left": 0}

    async def one(client: httpx.AsyncClient, places: asyncio.Semaphore) -> None:
        body = {
            "prompt": [draw.randrange(1, 200) for _ in range(draw.choice((1, 30, 140)))],
            "max_tokens": draw.randint(1, 15), "n": draw.choice((1, 1, 3)),
            "stream": draw.random() < 0.5, "echo": draw.random() < 0.2,
            "logprobs": draw.choice((None, 1)), "ignore_eos": True,
        }  # fmt: skip
        if draw.random() < 0.2:
            body["prompt"] = [body["prompt"]] * 3
        patience = draw.choice((0.0, draw.uniform(0, 0.01), draw.uniform(0, 0.1), PATIENCE))
        async with places:
            try:
                async with asyncio.timeout(patience):
                    answer = await client.post("/v1/completions", json=body)
                    assert answer.status_code == 200, answer.text
                    ended["answered"] += 1
            except TimeoutError:
                ended["left"] += 1

    async def storm(count: int) -> None:
        limits = httpx.Limits(max_connections=24)
        async with httpx.AsyncClient(
            base_url=url(server), timeout=PATIENCE, limits=limits
        ) as client:
            places = asyncio.Semaphore(24)
            await asyncio.gather(*[one(client, places) for _ in range(count)])

    asyncio.run(storm(COUNT // 4))
    leaks = Leaks(server)
    ended.update(answered=0, left=0)
    asyncio.run(storm(COUNT))
    leaks.check("HTTP: calls abandoned at random moments", ended)
    assert min(ended.values()) > COUNT / 10, ended
    assert errors(caplog) == []
    whole = httpx.post(
        f"{url(server)}/v1/completions", json={"prompt": [1] * (CONTEXT - 1)}, timeout=PATIENCE
    )
    assert whole.is_success
