"""Two servers and a client that spreads its calls over them."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.client import Client, build_request
from tests.serve.conftest import PATIENCE, HeldDecoder, LiveServer, StartServer, wait_until

POISON = 66
"""A token that ends the engine which computes it."""


class Poisonable(HeldDecoder):
    """A decoder whose engine does not survive a prompt that holds `POISON`."""

    def prefill(self, slot: int, ids: np.ndarray, start: int = 0) -> None:
        super().prefill(slot, ids, start)
        if POISON in ids:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def spread(*servers: LiveServer) -> str:
    """A target whose calls go to the servers in turn."""
    return "ipv4:" + ",".join(server.target for server in servers)


@pytest.fixture
def pair(start: StartServer, model: GPT) -> list[LiveServer]:
    return [start(Poisonable(Decoder(model, max_slots=1, dtype="fp32"))) for _ in range(2)]


def reach(client: Client, servers: list[LiveServer]) -> None:
    """Call until each of the servers has answered: the client is connected to all of them."""
    method = "gpt_dist.v1.ModelService/GetModelInfo"

    def answered(server: LiveServer) -> bool:
        return server.server.metrics.calls.labels(method, "OK")._value.get() > 0

    wait_until(lambda: client.info() and all(answered(server) for server in servers))


def outcome(call: Any) -> str:
    """The status that a call ends with."""
    error = call.exception(PATIENCE)
    return "OK" if error is None else str(error.code().name)


def test_a_poisoned_request_ends_one_engine(pair: list[LiveServer]) -> None:
    """The client's default retries do not carry it on; waiting calls move to the other server."""
    decoders = [server.scheduler.decoder for server in pair]
    with Client(spread(*pair)) as client:
        reach(client, pair)
        for decoder in decoders:
            decoder.hold()
        innocent = build_request([1, 2, 3], max_new_tokens=3, ignore_eos=True)
        running = [client._stub.Generate.future(innocent, timeout=PATIENCE) for _ in range(2)]
        wait_until(lambda: all(server.scheduler.load == 1 for server in pair))
        poison = client._stub.Generate.future(build_request([POISON] * 20), timeout=PATIENCE)
        wait_until(lambda: sum(server.scheduler.load for server in pair) == 3)
        waiting = [client._stub.Generate.future(innocent, timeout=PATIENCE) for _ in range(4)]
        wait_until(lambda: sum(server.scheduler.load for server in pair) == 7)
        for decoder in decoders:
            decoder.release()
        assert outcome(poison) == "ABORTED"
        assert [outcome(call) for call in (*running, *waiting)] == ["OK"] * 6
        assert sorted(server.engine.failure is None for server in pair) == [False, True]


def test_a_stream_that_was_running_is_aborted(start: StartServer, model: GPT) -> None:
    """What runs beside the poison is lost too. Its caller decides whether to repeat it."""
    decoder = Poisonable(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(decoder)
    with Client(server.target) as client:
        decoder.hold()
        decoder.allow(4)
        stream = client.stream([1], max_new_tokens=100, ignore_eos=True)
        next(stream)
        poison = client._stub.Generate.future(build_request([POISON] * 20), timeout=PATIENCE)
        wait_until(lambda: server.scheduler.load == 2)
        decoder.release()
        assert outcome(poison) == "ABORTED"
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() == grpc.StatusCode.ABORTED


def test_a_defect_of_one_call_is_internal_and_not_repeated(
    start: StartServer, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the code that receives a call's tokens ends this call alone."""
    from serve.api.generation import Output

    add, heard = Output._add, []

    def choke(output: Output, event: Any) -> None:
        if POISON in output.job.ids:
            heard.append(event)
            raise KeyError("a defect")
        add(output, event)

    monkeypatch.setattr(Output, "_add", choke)
    server = start(Decoder(model, max_slots=4, dtype="fp32"))
    with Client(server.target) as client:
        bad = client._stub.Generate.future(build_request([POISON]), timeout=PATIENCE)
        good = client._stub.Generate.future(build_request([1]), timeout=PATIENCE)
        assert outcome(bad) == "INTERNAL"
        assert outcome(good) == "OK"
    server.wait_at_rest()
    assert server.engine.failure is None
    assert (
        server.server.metrics.calls.labels(
            "gpt_dist.v1.GenerationService/Generate", "INTERNAL"
        )._value.get()
        == 1
    )
