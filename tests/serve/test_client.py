"""The clients: deadlines, which calls are repeated, and what the command line says."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.api.served import Served
from serve.api.status import StatusError, overloaded, unavailable
from serve.client import AsyncClient, Client
from serve.client.__main__ import main
from tests.serve.conftest import CONTEXT, TOKENIZER, HeldDecoder, StartServer, wait_until


def test_the_client_has_a_deadline(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder)
    decoder.hold()
    with pytest.raises(grpc.RpcError) as caught:
        Client(server.target, timeout=0.3).generate([1])
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    decoder.release()
    server.wait_at_rest()


EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("refusal", "attempts"),
    [
        (unavailable("the server is shutting down", "DRAINING"), 2),
        (overloaded(0.1), 2),
        (StatusError(EXHAUSTED, "a limit", "CALLER_WAITING_LIMIT", retry_after=0.1), 1),
        (StatusError(grpc.StatusCode.ABORTED, "it failed", "ENGINE_FAILED"), 1),
    ],
)
def test_the_client_repeats_only_what_had_no_effect(
    start: StartServer,
    model: GPT,
    refusal: StatusError,
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server refuses once, as during a restart."""
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    service, made = server.server.service, []
    accept = service.accept

    def refuse_once(*model: str) -> Served:
        made.append(1)
        if len(made) == 1:
            raise refusal
        return accept(*model)

    monkeypatch.setattr(service, "accept", refuse_once)
    client = Client(server.target)
    if attempts == 1:
        with pytest.raises(grpc.RpcError) as caught:
            client.generate([1], max_new_tokens=1)
        assert caught.value.code() == refusal.code
    else:
        assert client.generate([1], max_new_tokens=1).usage.completion_tokens == 1
    assert len(made) == attempts


CAPITAL = TOKENIZER.encode("T")[0]
ENDS = [
    ("--max-new-tokens 5 --ignore-eos", "limit of 5 tokens", "length"),
    (
        "--max-new-tokens 500 --ignore-eos",
        f"the model's context of {CONTEXT} tokens is full",
        "context full",
    ),
    (f"--logit-bias {TOKENIZER.eot_id}=1000", "the model ended the text", "eos"),
    (f"--logit-bias {CAPITAL}=1000 --stop TT", "stop sequence 'TT'", "stop sequence"),
    (
        f"--logit-bias {CAPITAL}=1000 --stop-token-ids {CAPITAL}",
        f"stop token {CAPITAL}",
        "stop token",
    ),
]


@pytest.mark.parametrize(("flags", "why", "log"), ENDS)
def test_the_command_line_and_the_log_say_why_a_text_ended(
    flags: str,
    why: str,
    log: str,
    start: StartServer,
    model: GPT,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "serve")
    server = start(Decoder(model, max_slots=2, dtype="fp32"))
    common = ["generate", "to be", "--temperature", "0", "--target", server.target, *flags.split()]
    for streaming in ([], ["--stream"]):
        assert main([*common, *streaming]) == 0
        assert capsys.readouterr().err == f"ended: {why}\n"
        assert main([*common, *streaming, "-n", "2"]) == 0
        expected = {f"[{index}] ended: {why}" for index in (0, 1)}
        assert set(capsys.readouterr().err.splitlines()) == expected
        assert main([*common, *streaming, "--json"]) == 0
        assert capsys.readouterr().err == ""

    def said() -> list[Any]:
        return [r.ended for r in list(caplog.records) if hasattr(r, "ended")]

    wait_until(lambda: len(said()) == 6)  # a call is logged after its answer
    assert set(said()) == {log}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_time_budget_is_named(
    streaming: bool, start: StartServer, model: GPT, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"), pause=0.05)
    server = start(decoder)
    flags = ["--time-budget", "0.2", "--max-new-tokens", "150", "--ignore-eos"]
    main(["generate", "x", *flags, "--target", server.target, *["--stream"] * streaming])
    assert capsys.readouterr().err == "ended: the time budget is used up\n"


def test_a_server_that_cannot_be_reached_is_not_healthy() -> None:
    with Client("127.0.0.1:1") as client:
        assert not client.health()
        with pytest.raises(grpc.RpcError):
            client.health(reachable=True)


def test_the_asyncio_client_tells_the_same() -> None:
    async def ask() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            assert not await client.health()
            with pytest.raises(grpc.RpcError):
                await client.health(reachable=True)

    asyncio.run(ask())
