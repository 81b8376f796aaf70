"""Loading, health, draining, overload, failure of the engine, new weights, metrics."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import time
import urllib.request
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
from prometheus_client.parser import text_string_to_metric_families

from gpt_dist.errors import GptDistError, run_main
from gpt_dist.inference.decoder import Decoder, generate
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_service_pb2 as api
from serve.__main__ import main
from serve.client import AsyncClient, Client, build_request
from serve.options import Options
from serve.server import Server
from tests.serve.conftest import LiveServer, SlowDecoder, StartServer, loaded, tiny_model

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
GREEDY = SamplingParams(temperature=0)


class Watcher:
    """Collects what Watch says."""

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

    def expect(self, *statuses: int, seconds: float = 3) -> None:
        until = time.monotonic() + seconds
        while self.seen != list(statuses) and time.monotonic() < until:
            time.sleep(0.01)
        assert self.seen == list(statuses)


def test_calls_while_loading(start: StartServer, model: GPT) -> None:
    server = start()
    watcher = Watcher(server.target, "gpt_dist.v1.GenerationService")
    watcher.expect(NOT_SERVING)
    with Client(server.target, timeout=0.3) as client:
        assert not client.health()
        stub = client._stub
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(build_request([1]), timeout=0.1)
        assert caught.value.code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,  # while it was being retried
        )

        async def use() -> None:
            server.server.use(loaded(Decoder(model, max_slots=2, dtype="fp32")))

        server.call(use())
        assert client.health()
        watcher.expect(NOT_SERVING, SERVING)
        assert client.generate([1], max_new_tokens=1).usage.completion_tokens == 1


def test_watch_outlives_other_watchers(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    first, second = Watcher(server.target), Watcher(server.target)
    unknown = Watcher(server.target, "no.such.Service")
    first.expect(SERVING)
    second.expect(SERVING)
    unknown.expect(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
    first.call.cancel()
    time.sleep(0.05)
    server.close()
    second.expect(SERVING, NOT_SERVING)
    stub = health_pb2_grpc.HealthStub(unknown.channel)  # type: ignore[no-untyped-call]
    with pytest.raises(grpc.RpcError):
        stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))


def test_health_notices_a_stall(start: StartServer, model: GPT) -> None:
    slow = SlowDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(slow, stall_seconds=0.3)
    watcher = Watcher(server.target)
    time.sleep(0.7)  # being idle is no stall
    watcher.expect(SERVING)
    slow.go.clear()
    with Client(server.target) as client:
        call = client._stub.Generate.future(build_request([1], max_new_tokens=2))
        watcher.expect(SERVING, NOT_SERVING)
        began = time.monotonic()
        assert not client.health()
        assert time.monotonic() - began < 0.5
        slow.go.set()
        call.result()
        watcher.expect(SERVING, NOT_SERVING, SERVING)


def test_a_dead_engine_fails_every_call_at_once(start: StartServer, model: GPT) -> None:
    slow = SlowDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(slow)
    watcher = Watcher(server.target)
    slow.go.clear()
    with Client(server.target) as client:
        # Without the client's retries, to see the answers themselves.
        options = [("grpc.enable_retries", 0)]
        channel = grpc.insecure_channel(server.target, options)
        generate_call = channel.unary_unary(
            "/gpt_dist.v1.GenerationService/Generate",
            lambda message: message.SerializeToString(),
            api.GenerateResponse.FromString,
        )
        calls = [generate_call.future(build_request([1])) for _ in range(5)]
        while server.scheduler.load < 5:
            time.sleep(0.01)
        slow.error = RuntimeError("CUDA error: an illegal memory access was encountered")
        began = time.monotonic()
        slow.go.set()
        for call in calls:
            assert call.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:
            generate_call(build_request([1]))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began < 1
        watcher.expect(SERVING, NOT_SERVING)
        assert not client.health()
    with pytest.raises(GptDistError, match=r"the engine failed.*illegal memory"):
        server.call(server.server.wait())


def test_a_dead_engine_ends_the_process_with_status_1(
    model: GPT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = SlowDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    slow.error = RuntimeError("out of memory")
    monkeypatch.setattr("serve.server.load", lambda options: loaded(slow))  # type: ignore[arg-type]
    monkeypatch.setattr("sys.argv", ["serve", "--checkpoint", "x", "--port", "0"])
    monkeypatch.setattr("serve.__main__.set_up", lambda *_: None)

    def ask() -> None:
        while "ready: " not in (text := capsys.readouterr().out):
            time.sleep(0.01)
        with Client(text.split("ready: ")[1].split()[0], timeout=5) as client:
            client._stub.Generate.future(build_request([1]), timeout=5).exception()

    asker = threading.Thread(target=ask)
    asker.start()
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    asker.join()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: the engine failed: out of memory\n"


def test_clients_may_ping_often(start: StartServer, model: GPT) -> None:
    """By default grpc disconnects a client that pings more than every five minutes."""
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    ping = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"12345678"
    kinds = []
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=0.5) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        for _ in range(20):
            connection.sendall(ping)
            time.sleep(0.01)
        reader = connection.makefile("rb")
        while kinds.count(6) < 20 and 7 not in kinds:
            header = reader.read(9)
            kinds.append(header[3])
            reader.read(int.from_bytes(header[:3], "big"))
    assert kinds.count(6) == 20  # answers
    assert 7 not in kinds  # GOAWAY


def test_draining_loses_no_accepted_request(start: StartServer, model: GPT) -> None:
    slow = SlowDecoder(Decoder(model, max_slots=4, dtype="fp32"), 0.002)
    server = start(slow, grace=20)

    async def one(client: AsyncClient, index: int) -> str:
        stub = client._stub
        try:
            if index % 3 == 0:
                call = stub.GenerateBatch(
                    api.GenerateBatchRequest(
                        requests=[build_request([1], max_new_tokens=5, ignore_eos=True)] * 20
                    )
                )
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
            while server.server.service.open_calls < 30:
                await asyncio.sleep(0.005)
            drain = asyncio.run_coroutine_threadsafe(server.server.drain(), server._loop)
            await asyncio.sleep(0.05)
            late = asyncio.create_task(one(client, 1))
            assert await asyncio.gather(*early) == ["OK"] * 30
            assert await late == "UNAVAILABLE"
            assert await asyncio.wrap_future(drain)

    asyncio.run(run())
    server._loop.call_soon_threadsafe(server._loop.stop)
    server._thread.join()


def test_what_the_grace_does_not_suffice_for_is_cut_off(start: StartServer, model: GPT) -> None:
    slow = SlowDecoder(Decoder(model, max_slots=1, dtype="fp32"), 0.02)
    server = start(slow, grace=0.2)
    with Client(server.target, timeout=30) as client:
        call = client.stream([1], max_new_tokens=150, ignore_eos=True)
        next(call)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 2
        with pytest.raises(grpc.RpcError):
            list(call)


@pytest.mark.slow
def test_overload(start: StartServer, model: GPT) -> None:
    """Ten times the capacity: quick refusals, flat memory, right answers."""
    slow = SlowDecoder(Decoder(model, max_slots=4, dtype="fp32"), 0.001)
    server = start(slow, max_queue=4)
    expected = list(generate(model, [1] * 30, GREEDY, 20))
    codes: dict[str, int] = {}
    rejections: list[float] = []

    async def worker(client: AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            began = time.monotonic()
            try:
                answer = await client.generate(
                    [1] * 30, temperature=0, max_new_tokens=20, ignore_eos=True
                )
                assert list(answer.outputs[0].token_ids) == expected
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                rejections.append(time.monotonic() - began)
                await asyncio.sleep(0.02)  # these clients do not heed RetryInfo
            codes[code] = codes.get(code, 0) + 1

    async def run(seconds: float) -> None:
        async with AsyncClient(server.target) as client:
            until = time.monotonic() + seconds
            await asyncio.gather(*[worker(client, until) for _ in range(80)])

    asyncio.run(run(2))
    gc.collect()
    before = psutil.Process().memory_info().rss
    codes.clear()
    asyncio.run(run(60 if os.environ.get("SOAK") else 6))
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 10 << 20
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}, codes
    assert codes["RESOURCE_EXHAUSTED"] > 5 * codes["OK"]
    assert codes["OK"] > 100
    assert server.at_rest()


def test_new_weights_under_load(start: StartServer, model: GPT) -> None:
    decoder = Decoder(model, max_slots=4, dtype="fp32")
    server = start(SlowDecoder(decoder, 0.001))
    models = [tiny_model(seed) for seed in range(4)]
    versions = {f"v{index}": model for index, model in enumerate(models)}
    prompt = list(range(40))
    expected = {
        version: list(generate(weights, prompt, GREEDY, 25))
        for version, weights in versions.items()
    }
    expected["v1"] = list(generate(model, prompt, GREEDY, 25))  # what it began with
    answers: list[tuple[str, list[int], int]] = []
    stop = threading.Event()

    def ask(client: Client) -> None:
        while not stop.is_set():
            response = client.generate(prompt, temperature=0, max_new_tokens=25, ignore_eos=True)
            tokens = list(response.outputs[0].token_ids)
            answers.append((response.weights_version, tokens, response.usage.cached_tokens))

    with Client(server.target) as client, ThreadPoolExecutor(6) as pool:
        askers = [pool.submit(ask, client) for _ in range(6)]
        engine = server.server.engine
        assert engine is not None
        for index in (2, 3):
            time.sleep(0.4)
            engine.swap(decoder.load_weights(models[index]), f"v{index}")
        time.sleep(0.4)
        stop.set()
        for asker in askers:
            asker.result()
    assert {version for version, *_ in answers} == {"v1", "v2", "v3"}
    for version, tokens, _ in answers:
        assert tokens == expected[version]
    assert max(cached for *_, cached in answers) == len(prompt) - 1
    assert server.at_rest()


def scrape(server: LiveServer) -> dict[tuple[str, ...], float]:
    url = f"http://127.0.0.1:{server.server.metrics_port}/metrics"
    text = urllib.request.urlopen(url).read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_match_what_was_sent(start: StartServer, model: GPT) -> None:
    slow = SlowDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(slow, metrics_port=0, max_queue=1)
    with Client(server.target) as client:
        for _ in range(3):
            client.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True, n=2)
        list(client.stream([1], temperature=0, stop_token_ids=[7], logit_bias={7: 1000}))
        with pytest.raises(grpc.RpcError):
            client.generate([1], temperature=-1)
        slow.go.clear()
        options: dict[str, Any] = {"max_new_tokens": 50, "ignore_eos": True}
        calls = [client._stub.Generate.future(build_request([1] * 9, **options)) for _ in range(3)]
        while server.scheduler.load < 3:
            time.sleep(0.01)
        with pytest.raises(grpc.RpcError):
            client.generate([1])
        slow.go.set()
        while len(server.scheduler.running) < 2:
            time.sleep(0.001)
        slow.go.clear()
        time.sleep(0.02)
        values = scrape(server)
        method = "gpt_dist.v1.GenerationService/Generate"
        assert values["gpt_dist_calls_total", "OK", method] == 3
        assert values["gpt_dist_calls_total", "INVALID_ARGUMENT", method] == 1
        assert values["gpt_dist_calls_total", "RESOURCE_EXHAUSTED", method] == 1
        assert values["gpt_dist_rejections_total", "queue_full"] == 1
        assert values["gpt_dist_finished_total", "length"] == 6
        assert values["gpt_dist_finished_total", "stop_token"] == 1
        assert values["gpt_dist_generated_tokens_total",] == 30
        assert values["gpt_dist_prompt_tokens_total",] == 3 * 3 + 1 + 3 * 9
        assert values["gpt_dist_call_seconds_count", method] == 5
        assert values["gpt_dist_running",] + values["gpt_dist_waiting",] == 3
        assert (values["gpt_dist_slots",], values["gpt_dist_queue_limit",]) == (2, 1)
        assert values["gpt_dist_kv_capacity_tokens",] == 2 * 160
        assert 0 <= values["gpt_dist_kv_tokens",] < 2 * 60
        assert values["gpt_dist_time_to_first_token_seconds_count",] >= 6
        assert values["gpt_dist_inter_token_seconds_count",] >= 6 * 4
        for call in calls:
            call.cancel()
        slow.go.set()
        assert server.at_rest()
        values = scrape(server)
        assert values["gpt_dist_cancelled_total",] == 3
        assert values["gpt_dist_calls_total", "CANCELLED", method] == 3
        assert values["gpt_dist_running",] == values["gpt_dist_waiting",] == 0


def test_reflection(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"), kserve=True)
    with grpc.insecure_channel(server.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "gpt_dist.v1.GenerationService",
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

    with pytest.raises(GptDistError, match=r"cannot listen on 127.0.0.1:\d+: the port is taken"):
        asyncio.run(second(port=server.server.port))
    with pytest.raises(GptDistError, match="cannot serve metrics"):
        asyncio.run(second(port=0, metrics_port=server.server.metrics_port))
