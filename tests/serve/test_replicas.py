"""Several servers and a client that spreads its calls over them; connections and their ends."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.api.status import StatusError
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
        wait_until(lambda: all(len(server.scheduler.jobs) == 1 for server in pair))
        poison = client._stub.Generate.future(build_request([POISON] * 20), timeout=PATIENCE)
        wait_until(lambda: sum(len(server.scheduler.jobs) for server in pair) == 3)
        waiting = [client._stub.Generate.future(innocent, timeout=PATIENCE) for _ in range(4)]
        wait_until(lambda: sum(len(server.scheduler.jobs) for server in pair) == 7)
        for decoder in decoders:
            decoder.release()
        assert outcome(poison) == "ABORTED"
        assert [outcome(call) for call in (*running, *waiting)] == ["OK"] * 6
        assert sorted(server.engine.failure is None for server in pair) == [False, True]


def method_calls(server: LiveServer, code: str) -> float:
    """How many calls have ended so. They are counted after their callers know."""
    method = "gpt_dist.v1.GenerationService/Generate"
    return float(server.server.metrics.calls.labels(method, code)._value.get())


@pytest.mark.slow(5)
@pytest.mark.parametrize("count", [2, 3])
def test_a_full_replica_fails_no_call_while_another_has_room(
    start: StartServer, model: GPT, count: int
) -> None:
    full, *idle = servers = [
        start(HeldDecoder(Decoder(model, max_slots=2, dtype="fp32")), max_queue=50 if index else 0)
        for index in range(count)
    ]
    request = build_request([1], max_new_tokens=2, ignore_eos=True)
    with Client(full.target) as filler, Client(spread(*servers)) as client:
        reach(client, servers)
        full.scheduler.decoder.hold()
        blocking = [filler._stub.Generate.future(request, timeout=PATIENCE) for _ in range(2)]
        wait_until(lambda: len(full.scheduler.jobs) == 2)
        # Each is repeated at the next server, which has room, and more than the budget of 50 are.
        for _ in range(120):
            assert client._stub.Generate(request, timeout=PATIENCE).usage.completion_tokens == 2
        wait_until(lambda: sum(method_calls(server, "OK") for server in idle) == 120)
        assert method_calls(full, "RESOURCE_EXHAUSTED") > 50
        full.scheduler.decoder.release()
        assert [outcome(call) for call in blocking] == ["OK"] * 2


def test_repetitions_have_a_budget(start: StartServer, model: GPT) -> None:
    """When all servers are full, clients do not multiply the load."""
    server = start(HeldDecoder(Decoder(model, max_slots=1, dtype="fp32")), max_queue=0)
    server.scheduler.decoder.hold()
    request = build_request([1], max_new_tokens=2, ignore_eos=True)
    with Client(server.target) as client:
        running = client._stub.Generate.future(request, timeout=PATIENCE)
        wait_until(lambda: len(server.scheduler.jobs) == 1)
        calls = [client._stub.Generate.future(request, timeout=PATIENCE) for _ in range(200)]
        assert {outcome(call) for call in calls} == {"RESOURCE_EXHAUSTED"}
        assert method_calls(server, "RESOURCE_EXHAUSTED") < 300
        server.scheduler.decoder.release()
        assert outcome(running) == "OK"


@pytest.mark.parametrize(
    ("reason", "attempts", "wait"),
    [
        ("QUEUE_FULL", 0, 20),
        ("QUEUE_FULL", 1, 700),
        ("DEADLINE_UNREACHABLE", 0, 20),
        ("CALLER_WAITING_LIMIT", 0, -1),
        ("MESSAGE_TOO_LARGE", 2, -1),
    ],
)
def test_the_server_says_when_to_repeat(reason: str, attempts: int, wait: int) -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert StatusError(code, "", reason, retry_after=0.7).pushback(attempts) == wait
    assert StatusError(code, "", "QUEUE_FULL", retry_after=9.0).pushback(3) == 1000
    assert StatusError(grpc.StatusCode.UNAVAILABLE, "", "LOADING").pushback(0) is None


def test_a_stream_that_was_running_is_aborted(start: StartServer, model: GPT) -> None:
    """What runs beside the poison is lost too. Its caller decides whether to repeat it."""
    decoder = Poisonable(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(decoder)
    with Client(server.target) as client:
        decoder.hold()
        decoder.allow(4)
        stream = client.stream([1], max_new_tokens=100, ignore_eos=True)
        next(stream)
        wait_until(lambda: decoder.held)  # else the poison may be computed before it is seen
        poison = client._stub.Generate.future(build_request([POISON] * 20), timeout=PATIENCE)
        wait_until(lambda: len(server.scheduler.jobs) == 2)
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
    wait_until(lambda: method_calls(server, "INTERNAL") == 1)


def frames(server: LiveServer) -> Iterator[int]:
    """The kinds of the HTTP/2 frames that a server sends to an idle client."""
    address = ("127.0.0.1", server.server.port)
    with socket.create_connection(address, timeout=PATIENCE) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        reader = connection.makefile("rb")
        while header := reader.read(9):
            reader.read(int.from_bytes(header[:3], "big"))
            yield header[3]


GOAWAY = 7


def test_a_drain_begins_with_goaway(start: StartServer, model: GPT) -> None:
    """Clients learn of it while accepted calls still run, not when all is over."""
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, grace=PATIENCE)
    decoder.hold()
    with Client(server.target) as client:
        call = client._stub.Generate.future(build_request([1], max_new_tokens=3, ignore_eos=True))
        wait_until(lambda: decoder.held)
        seen = frames(server)
        assert next(seen) is not None  # it is connected
        drain = server.begin(server.server.drain())
        assert GOAWAY in seen
        assert not drain.done()
        assert not call.done()
        decoder.release()
        assert call.result(PATIENCE).usage.completion_tokens == 3
        assert drain.result(PATIENCE)


def test_calls_that_outlast_a_drain_know_whether_to_repeat(start: StartServer, model: GPT) -> None:
    """Never CANCELLED, which says that the caller gave up."""
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, grace=0.1)
    decoder.hold()
    with grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        request = build_request([1], max_new_tokens=9, ignore_eos=True)
        running = stub.Generate.future(request)
        wait_until(lambda: decoder.held)
        waiting = [stub.Generate.future(request) for _ in range(3)]
        batch = stub.GenerateBatch(iter([api.GenerateBatchRequest(request=request)] * 3))
        wait_until(lambda: len(server.scheduler.jobs) > 4)
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        watch = health.Watch(health_pb2.HealthCheckRequest())
        next(watch)
        drain = server.begin(server.server.drain())
        assert outcome(running) == "ABORTED"
        assert [outcome(call) for call in waiting] == ["UNAVAILABLE"] * 3
        assert {answer.error.code for answer in batch} == {grpc.StatusCode.UNAVAILABLE.value[0]}
        with pytest.raises(grpc.RpcError) as caught:
            list(watch)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        decoder.release()
        assert drain.result(PATIENCE) is False


def test_open_streams_without_work_end_with_a_status(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"), kserve=True, grace=0.1)
    with grpc.insecure_channel(server.target) as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        silent = threading.Event()

        def never() -> Iterator[Any]:
            silent.wait(PATIENCE)
            yield from ()

        calls = [
            stub.GenerateBatch(never()),
            channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(never()),
        ]
        wait_until(lambda: server.server.gate.calls == 2)
        server.call(server.server.drain())
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() == grpc.StatusCode.ABORTED
            assert "shutting down" in caught.value.details()
        silent.set()


@pytest.mark.slow(5)
@pytest.mark.parametrize("count", [2, 3])
def test_rolling_restarts_lose_no_call(start: StartServer, model: GPT, count: int) -> None:
    """Servers under load; one after the other drains, and a new one takes its port."""
    servers = [start(Decoder(model, max_slots=2, dtype="fp32")) for _ in range(count)]
    ports = [server.server.port for server in servers]
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def ask(client: Client) -> None:
        while not stop.is_set():
            try:
                answer = client.generate([1, 2], max_new_tokens=5, ignore_eos=True)
                outcomes["OK" if answer.usage.completion_tokens == 5 else "short"] += 1
            except grpc.RpcError as error:
                outcomes[f"{error.code().name} {error.details()}"] += 1

    with Client(spread(*servers)) as client, ThreadPoolExecutor(4) as pool:
        reach(client, servers)
        asking = [pool.submit(ask, client) for _ in range(4)]
        try:
            for index in (*range(count), 0):
                before = outcomes["OK"]
                wait_until(lambda: outcomes["OK"] > before + 20)  # noqa: B023
                servers[index].call(servers[index].server.drain())
                servers[index] = start(Decoder(model, max_slots=2, dtype="fp32"), port=ports[index])
                reach(client, [servers[index]])
        finally:
            stop.set()
        for asker in asking:
            asker.result(PATIENCE)
    assert set(outcomes) == {"OK"}, outcomes


def test_clients_avoid_a_server_that_is_not_healthy(pair: list[LiveServer]) -> None:
    with Client(spread(*pair)) as client:
        reach(client, pair)
        pair[0].server._tasks[0].cancel()  # it would correct the state
        pair[0].server.health.set(False)
        watched = pair[0].server.gate
        assert watched.watches == 1
        method = ("gpt_dist.v1.ModelService/GetModelInfo", "OK")

        def answered() -> float:
            return float(pair[0].server.metrics.calls.labels(*method)._value.get())

        def settled() -> bool:
            """Ten calls in a row have gone to the other server."""
            before = answered()
            for _ in range(10):
                client.info()
            return answered() == before

        wait_until(settled)
        pair[0].server.health.set(True)
        before = answered()
        wait_until(lambda: client.info() and answered() > before)


def test_connections_age_and_lose_no_call(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(decoder, max_connection_age=0.2)
    with Client(server.target) as client:
        decoder.hold()
        decoder.allow(3)
        stream = client.stream([1], max_new_tokens=20, ignore_eos=True)
        tokens = len(next(stream).token_ids)
        for _ in range(3):  # connections come and go meanwhile
            assert GOAWAY in frames(server)
            assert client.info()
        decoder.release()
        assert tokens + sum(len(message.token_ids) for message in stream) == 20
    forever = start(Decoder(model, max_slots=1, dtype="fp32"), max_connection_age=0)
    assert next(frames(forever)) is not None


def test_clients_may_ping_often(start: StartServer, model: GPT) -> None:
    """By default grpc disconnects a client that pings more often than every five minutes."""
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    ping = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"12345678"
    kinds = []
    address = ("127.0.0.1", server.server.port)
    with socket.create_connection(address, timeout=PATIENCE) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        reader = connection.makefile("rb")
        for count in range(1, 21):
            connection.sendall(ping)
            while kinds.count(6) < count and 7 not in kinds:
                header = reader.read(9)
                kinds.append(header[3])
                reader.read(int.from_bytes(header[:3], "big"))
    assert kinds.count(6) == 20  # answers
    assert 7 not in kinds  # GOAWAY
