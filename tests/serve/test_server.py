"""Loading, health, draining, overload, failure of the engine, new weights, metrics."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from gpt_dist.errors import GptDistError, run_main
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.__main__ import main
from serve.client import AsyncClient, Client, build_request
from serve.client.words import failure
from serve.options import Options
from serve.server import Server
from tests.serve.conftest import (
    PATIENCE,
    Clock,
    HeldDecoder,
    StartServer,
    loaded,
    tiny_model,
    wait_until,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
GREEDY = SamplingParams(temperature=0)


RunProcess = Callable[..., tuple[int, str]]


class Watcher:
    """Collects the states that Watch reports."""

    def __init__(self, target: str, service: str = "") -> None:
        self.channel = grpc.insecure_channel(target)
        stub = health_pb2_grpc.HealthStub(self.channel)  # type: ignore[no-untyped-call]
        self.call = stub.Watch(health_pb2.HealthCheckRequest(service=service))
        self.seen: list[int] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            for answer in self.call:
                self.seen.append(answer.status)
        except grpc.RpcError:
            pass

    def expect(self, *statuses: int) -> None:
        wait_until(lambda: self.seen == list(statuses), f"{statuses}, seen {self.seen}")


def generate_once(target: str) -> Any:
    """The method Generate without the client's retry policy."""
    channel = grpc.insecure_channel(target, [("grpc.enable_retries", 0)])
    return GenerationServiceStub(channel).Generate  # type: ignore[no-untyped-call]


def test_calls_while_loading(start: StartServer, model: GPT) -> None:
    server = start()
    watcher = Watcher(server.target, "gpt_dist.v1.GenerationService")
    watcher.expect(NOT_SERVING)
    with Client(server.target) as client:
        assert not client.health()
        with pytest.raises(grpc.RpcError, match="the model is loading") as caught:
            generate_once(server.target)(build_request([1]), timeout=PATIENCE)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:  # after retries
            client.generate([1])
        assert "is not ready: it is loading" in str(failure(caught.value, server.target))
        server.use(Decoder(model, max_slots=2, dtype="fp32"))
        assert client.health()
        watcher.expect(NOT_SERVING, SERVING)
        answer = client.generate([1], max_new_tokens=1, ignore_eos=True)
        assert answer.usage.completion_tokens == 1


def test_watch_outlives_other_watchers(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    first, second = Watcher(server.target), Watcher(server.target)
    unknown = Watcher(server.target, "no.such.Service")
    first.expect(SERVING)
    second.expect(SERVING)
    unknown.expect(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
    stub = health_pb2_grpc.HealthStub(unknown.channel)  # type: ignore[no-untyped-call]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    first.call.cancel()
    calls = server.server.metrics.calls.labels("grpc.health.v1.Health/Watch", "CANCELLED")
    wait_until(lambda: calls._value.get() == 1)
    server.close()
    second.expect(SERVING, NOT_SERVING)


def test_health_notices_a_stall(start: StartServer, model: GPT) -> None:
    decoder, clock = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32")), Clock()
    server = start(decoder, clock, stall_seconds=30)
    watcher = Watcher(server.target)
    watcher.expect(SERVING)
    clock.now += 1000
    assert not server.engine.stalled(30)  # being idle is not a stall
    decoder.hold()
    with Client(server.target) as client:
        call = client._stub.Generate.future(build_request([1], max_new_tokens=2))
        wait_until(lambda: decoder.held)
        assert not server.engine.stalled(30)
        clock.now += 31
        watcher.expect(SERVING, NOT_SERVING)
        assert not client.health()
        decoder.release()
        call.result(PATIENCE)
        watcher.expect(SERVING, NOT_SERVING, SERVING)


def test_new_work_is_not_a_stall(start: StartServer, model: GPT) -> None:
    """However long the engine was idle, and however late its thread wakes up."""
    clock = Clock()
    server = start(Decoder(model, max_slots=1, dtype="fp32"), clock)
    engine = server.engine
    wake, engine._wake = engine._wake, threading.Event()  # so that the thread stays asleep
    clock.now += 1000
    with Client(server.target) as client:
        call = client._stub.Generate.future(build_request([1], max_new_tokens=2))
        wait_until(lambda: server.scheduler.busy)
        assert not engine.stalled(30)
        clock.now += 31
        assert engine.stalled(30)
        wake.set()
        call.result(PATIENCE)


def test_a_dead_engine_fails_every_call_at_once(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(decoder)
    watcher = Watcher(server.target)
    watcher.expect(SERVING)
    decoder.hold()
    generate_call = generate_once(server.target)
    calls = [generate_call.future(build_request([1])) for _ in range(5)]
    wait_until(lambda: len(server.scheduler.jobs) == 5 and decoder.held)
    decoder.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert {job.slot >= 0 for job in server.scheduler.jobs.all()} == {True, False}
    decoder.release()
    codes = [call.exception(PATIENCE).code() for call in calls]
    # Those that were computed may be to blame. The others may be repeated elsewhere.
    assert set(codes) == {grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE}
    assert codes.count(grpc.StatusCode.ABORTED) <= 2
    with pytest.raises(grpc.RpcError) as caught:
        generate_call(build_request([1]))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    watcher.expect(SERVING, NOT_SERVING)
    with Client(server.target) as client:
        assert not client.health()
    with pytest.raises(GptDistError, match=r"the engine failed.*illegal memory"):
        server.call(server.server.wait())


@pytest.fixture
def run_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunProcess:
    """Run the command with a decoder in this process; returns exit status and stderr.

    ``user(target)`` runs in a thread, as soon as the command says that it is ready.
    """

    def run(decoder: Any, user: Callable[[str], None], *flags: str) -> tuple[int, str]:
        monkeypatch.setattr("serve.server.load", lambda options: loaded(decoder))
        monkeypatch.setattr("sys.argv", ["serve", "--checkpoint", "x", "--port", "0", *flags])
        monkeypatch.setattr("serve.logs.set_up", lambda *_: None)

        def use() -> None:
            printed = [""]

            def ready() -> bool:
                printed[0] += capsys.readouterr().out
                return "ready: " in printed[0]

            wait_until(ready)
            user(printed[0].split("ready: ")[1].split()[0])

        with ThreadPoolExecutor(1) as pool:
            using = pool.submit(use)
            with pytest.raises(SystemExit) as caught:
                run_main(main)
            using.result(PATIENCE)
        return caught.value.code, capsys.readouterr().err  # type: ignore[return-value]

    return run


def test_a_dead_engine_ends_the_process_with_status_1(model: GPT, run_process: RunProcess) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    decoder.error = RuntimeError("out of memory")

    def ask(target: str) -> None:
        with pytest.raises(grpc.RpcError):
            generate_once(target)(build_request([1]), timeout=PATIENCE)

    assert run_process(decoder, ask) == (1, "error: the engine failed: out of memory\n")


def test_a_second_signal_cuts_the_draining_short(model: GPT, run_process: RunProcess) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    decoder.hold()

    def interrupt(target: str) -> None:
        watcher = Watcher(target)
        watcher.expect(SERVING)
        call = generate_once(target).future(build_request([1]), timeout=PATIENCE)
        wait_until(lambda: decoder.held)
        os.kill(os.getpid(), signal.SIGTERM)
        watcher.expect(SERVING, NOT_SERVING)
        assert not call.done()  # the first signal waits for it
        os.kill(os.getpid(), signal.SIGINT)
        assert call.exception(PATIENCE).code() != grpc.StatusCode.DEADLINE_EXCEEDED
        decoder.release()

    status, _ = run_process(decoder, interrupt, "--grace", "3600")
    assert status == 0


def test_draining_loses_no_accepted_request(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=4, dtype="fp32"))
    server = start(decoder, grace=PATIENCE)
    decoder.hold()

    async def one(client: AsyncClient, index: int) -> str:
        stub = client._stub
        try:
            if index % 3 == 0:
                request = build_request([1], max_new_tokens=5, ignore_eos=True)
                call = stub.GenerateBatch([api.GenerateBatchRequest(request=request)] * 20)
                items = [item async for item in call]
                assert len(items) == 20
                assert all(item.HasField("response") for item in items)
            else:
                answer = await client.generate([1] * 50, max_new_tokens=30, ignore_eos=True)
                assert answer.usage.completion_tokens == 30
            return "OK"
        except grpc.aio.AioRpcError as error:
            return error.code().name

    async def run() -> None:
        async with AsyncClient(server.target) as client:
            early = [asyncio.create_task(one(client, index)) for index in range(30)]
            await asyncio.to_thread(wait_until, lambda: server.open_calls == 30)
            drain = server.begin(server.server.drain())
            await asyncio.to_thread(wait_until, lambda: server.server.service.draining)
            late = generate_once(server.target).future(build_request([1]))
            error = await asyncio.to_thread(late.exception, PATIENCE)
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert not drain.done()
            decoder.release()
            assert await asyncio.gather(*early) == ["OK"] * 30
            assert await asyncio.wrap_future(drain)

    asyncio.run(run())


def test_calls_that_outlast_the_grace_are_cut_off(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, grace=0.1)
    decoder.hold()
    call = generate_once(server.target).future(build_request([1]), timeout=PATIENCE)
    wait_until(lambda: decoder.held)
    drain = server.begin(server.server.drain())
    assert call.exception(PATIENCE).code() != grpc.StatusCode.DEADLINE_EXCEEDED
    decoder.release()
    assert drain.result(PATIENCE) is False


@pytest.mark.slow(2)
def test_overload(start: StartServer, model: GPT) -> None:
    """Ten times the capacity: immediate refusals, correct answers, constant memory."""
    decoder = HeldDecoder(Decoder(model, max_slots=4, dtype="fp32"))
    server = start(decoder, max_queue=4)
    expected = list(generate(model, [1] * 30, GREEDY, 20))
    options = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}

    async def round_of_calls(client: AsyncClient) -> None:
        decoder.hold()
        calls = [asyncio.create_task(client.generate([1] * 30, **options)) for _ in range(80)]
        # The engine is held, so any call that ends was refused.
        pending = set(calls)
        while len(pending) > 8:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for call in done:
                error = call.exception()
                assert isinstance(error, grpc.aio.AioRpcError)
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        decoder.release()
        for answer in await asyncio.gather(*pending):
            assert list(answer.outputs[0].token_ids) == expected

    async def run(rounds: int) -> None:
        async with AsyncClient(server.target) as client:
            for _ in range(rounds):
                await round_of_calls(client)

    asyncio.run(run(2))
    gc.collect()
    before = psutil.Process().memory_info().rss
    asyncio.run(run(200 if os.environ.get("SOAK") else 5))
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 10 << 20
    server.wait_at_rest()


def test_new_weights_under_load(start: StartServer, model: GPT) -> None:
    decoder = Decoder(model, max_slots=4, dtype="fp32")
    server = start(decoder)
    models = {"v1": model, "v2": tiny_model(2), "v3": tiny_model(3)}
    prompt = list(range(40))
    expected = {
        version: list(generate(weights, prompt, GREEDY, 25)) for version, weights in models.items()
    }
    answers: list[tuple[str, list[int], int]] = []
    stop = threading.Event()

    def ask(client: Client) -> None:
        while not stop.is_set():
            response = client.generate(prompt, temperature=0, max_new_tokens=25, ignore_eos=True)
            tokens = list(response.outputs[0].token_ids)
            answers.append((response.weights_version, tokens, response.usage.cached_tokens))

    def answered(version: str) -> bool:
        return sum(answer[0] == version for answer in list(answers)) > 20

    with Client(server.target) as client, ThreadPoolExecutor(6) as pool:
        askers = [pool.submit(ask, client) for _ in range(6)]
        try:
            wait_until(lambda: answered("v1"))
            for version in ("v2", "v3"):
                server.engine.swap(decoder.load_weights(models[version]), version)
                wait_until(lambda: answered(version))  # noqa: B023
        finally:
            stop.set()
        for asker in askers:
            asker.result(PATIENCE)
    for version, tokens, _ in answers:
        assert tokens == expected[version]
    assert max(cached for *_, cached in answers) == len(prompt) - 1
    server.wait_at_rest()


def test_reflection(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"), kserve=True)
    with grpc.insecure_channel(server.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "gpt_dist.v1.GenerationService",
            "gpt_dist.v1.ModelService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "inference.GRPCInferenceService",
        }
        file = database.FindFileContainingSymbol("gpt_dist.v1.GenerationService")
        [service] = file.service
        assert [method.name for method in service.method][:2] == ["Generate", "GenerateStream"]


def test_a_taken_port_is_one_clear_error(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"), metrics_port=0)

    async def second(**values: Any) -> None:
        await Server(Options(checkpoint=Path("x"), **values)).start()

    with pytest.raises(GptDistError, match=r"cannot listen on 127.0.0.1:\d+: the port is in use"):
        asyncio.run(second(port=server.server.port))
    with pytest.raises(GptDistError, match="cannot serve metrics"):
        asyncio.run(second(port=0, metrics_port=server.server.metrics_port))
