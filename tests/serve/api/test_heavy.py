"""Nothing that a caller sends holds up the event loop.

What is too long is refused, and what is long is done in a thread, for which only so much may wait.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import grpc
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.heavy import LIGHT, Heavy
from serve.api.parsing import MAX_TEXT, parse_prompt
from serve.api.status import StatusError
from serve.client import Client, build_request
from tests.serve.api.conftest import details
from tests.serve.conftest import (
    PATIENCE,
    TOKENIZER,
    HeldDecoder,
    LiveServer,
    StartServer,
    loaded,
    tiny_model,
    wait_until,
)

LONG = "to be " * LIGHT


class Stuck:
    """A tokenizer that takes its time with long inputs, and notes the threads that use it."""

    def __init__(self) -> None:
        self.go, self.threads = threading.Event(), list[threading.Thread]()

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)

    def _wait(self, size: int) -> None:
        self.threads.append(threading.current_thread())
        if size > LIGHT:
            self.go.wait(PATIENCE)

    def encode(self, text: str) -> list[int]:
        self._wait(len(text))
        return TOKENIZER.encode(text)

    def decode(self, ids: Any) -> str:
        self._wait(len(ids))
        return TOKENIZER.decode(ids)


@pytest.fixture
def stuck(start: StartServer) -> tuple[LiveServer, Stuck]:
    """A server whose tokenizer is held."""
    tokenizer = Stuck()
    decoder = Decoder(tiny_model(context=320), max_slots=2, dtype="fp32")  # takes heavy texts
    server = start(grace=PATIENCE)

    async def use() -> None:
        server.server.use(loaded(decoder, tokenizer))  # type: ignore[arg-type]

    server.call(use())
    return server, tokenizer


def futures(client: Client) -> dict[str, Any]:
    """A heavy call of each kind."""
    stub = client._stub
    return {
        "tokenize": stub.Tokenize.future(api.TokenizeRequest(text=LONG), timeout=PATIENCE),
        "detokenize": stub.Detokenize.future(
            api.DetokenizeRequest(token_ids=[1] * (LIGHT + 1)), timeout=PATIENCE
        ),
        "generate": stub.Generate.future(build_request("x" * (LIGHT + 1)), timeout=PATIENCE),
    }


def test_heavy_work_leaves_the_loop_and_counts(stuck: tuple[LiveServer, Stuck]) -> None:
    """Health answers meanwhile, and a drain waits for it."""
    server, tokenizer = stuck
    with Client(server.target) as client:
        calls = futures(client)
        wait_until(lambda: server.open_calls == 3)
        assert client.health()
        assert client.tokenize("to be")  # light work overtakes it
        drain = server.begin(server.server.drain())
        wait_until(lambda: server.server.service.draining)
        assert not any(call.done() for call in calls.values())
        tokenizer.go.set()
        assert list(calls["tokenize"].result(PATIENCE).token_ids) == TOKENIZER.encode(LONG)
        assert len(calls["detokenize"].result(PATIENCE).text)
        calls["generate"].exception(PATIENCE)
        assert drain.result(PATIENCE)
    names = {thread.name.split("_")[0] for thread in tokenizer.threads}
    assert "heavy" in names


def test_waiting_heavy_work_is_bounded(stuck: tuple[LiveServer, Stuck]) -> None:
    server, tokenizer = stuck
    served = server.server.service.served
    assert served is not None
    served.limits.heavy.most = 2
    with Client(server.target) as client:
        waiting = [
            client._stub.Tokenize.future(api.TokenizeRequest(text=LONG), timeout=PATIENCE)
            for _ in range(2)
        ]
        wait_until(lambda: server.open_calls == 2)
        for call in futures(client).values():
            error = call.exception(PATIENCE)
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details(error)["ErrorInfo"].reason == "QUEUE_FULL"
        tokenizer.go.set()
        for call in waiting:
            call.result(PATIENCE)
        assert client.tokenize(LONG) == TOKENIZER.encode(LONG)


def test_a_full_queue_refuses_before_it_tokenises(start: StartServer, model: GPT) -> None:
    tokenizer, decoder = Stuck(), HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(max_queue=0)

    async def use() -> None:
        server.server.use(loaded(decoder, tokenizer))  # type: ignore[arg-type]

    server.call(use())
    decoder.hold()
    with Client(server.target) as client:
        blocker = client._stub.Generate.future(build_request([1], max_new_tokens=2))
        wait_until(lambda: len(server.scheduler.jobs) == 1)
        for method, request in (
            (client._stub.Generate, build_request("to be")),
            (client._stub.Score, api.ScoreRequest(prompt=build_request("to be").prompt)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                method(request, timeout=PATIENCE)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert tokenizer.threads == []
        decoder.release()
        blocker.result(PATIENCE)


@pytest.mark.parametrize(
    "method", ["Generate", "GenerateStream", "Score", "Tokenize", "Detokenize"]
)
def test_long_messages_are_refused_before_they_are_parsed(server: LiveServer, method: str) -> None:
    """These bytes are no message, which would be INVALID_ARGUMENT."""
    served = server.server.service.served
    assert served is not None
    most = served.limits.request_bytes
    with grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
        call = channel.unary_unary(f"/gpt_dist.v1.GenerationService/{method}")
        for size in (most + 1, 1_000_000):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff" * size, timeout=PATIENCE)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details(caught.value)["ErrorInfo"].reason == "MESSAGE_TOO_LARGE"


def test_texts_and_ids_are_bounded(client: Client) -> None:
    for call, field in (
        (lambda: client.tokenize("x" * (MAX_TEXT + 1)), "text"),
        (lambda: client.detokenize([1] * (MAX_TEXT + 1)), "token_ids"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert details(caught.value)["BadRequest"].field_violations[0].field == field
    assert len(client.tokenize("x" * MAX_TEXT)) > 0
    assert len(client.detokenize([65] * MAX_TEXT)) > 0


def test_the_length_of_a_prompt_is_checked_first(server: LiveServer) -> None:
    """Ids that are too many are not copied, and not compared."""
    served = server.server.service.served
    assert served is not None

    class Many:
        """A repeated field that must not be walked through."""

        def __len__(self) -> int:
            return 10**9

    class Prompt:
        token_ids = type("Ids", (), {"ids": Many()})()

        def WhichOneof(self, name: str) -> str:
            return "token_ids"

    with pytest.raises(StatusError, match="has 1000000000 tokens"):
        asyncio.run(parse_prompt(Prompt(), served.limits))


def test_a_cancelled_piece_is_dropped() -> None:
    """It gives back its place, and is not done if it had not begun."""
    heavy, go, done = Heavy(2), threading.Event(), []

    async def run() -> None:
        first = asyncio.create_task(heavy.run(LIGHT + 1, lambda: go.wait(PATIENCE)))
        second = asyncio.create_task(heavy.run(LIGHT + 1, lambda: done.append(1)))
        while heavy.waiting < 2:
            await asyncio.sleep(0)
        with pytest.raises(StatusError):
            await heavy.run(LIGHT + 1, lambda: None)
        assert await heavy.run(LIGHT, lambda: 7) == 7
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert heavy.waiting == 1
        go.set()
        assert await first
        await heavy.run(LIGHT + 1, lambda: None)

    asyncio.run(run())
    assert done == []


def test_heavy_work_leaves_half_of_the_time_to_others() -> None:
    """A piece that follows another begins as long after its end as that one took."""
    heavy, times = Heavy(), list[float]()

    def work() -> None:
        times.append(time.monotonic())
        time.sleep(0.02)
        times.append(time.monotonic())

    async def run() -> None:
        await asyncio.gather(*[heavy.run(LIGHT + 1, work) for _ in range(3)])

    asyncio.run(run())
    for began, ended, following in zip(times[::2], times[1::2], times[2::2], strict=False):
        assert following - ended >= ended - began


def test_an_unknown_field_repeated_a_million_times(server: LiveServer) -> None:
    """To list the fields would take seconds."""
    served = server.server.service.served
    assert served is not None
    data = (b"\x78\x01") * (served.limits.request_bytes // 2)
    with grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
        call = channel.unary_unary("/gpt_dist.v1.GenerationService/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=PATIENCE)
    assert details(caught.value)["ErrorInfo"].reason == "UNKNOWN_FIELD"
