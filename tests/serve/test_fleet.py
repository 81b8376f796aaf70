"""Two and three servers behind HAProxy, with the configuration that launch/fleet gives it."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from gpt_dist.errors import UsageError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.client import Client, build_request
from tests.components import require
from tests.conftest import free_ports
from tests.serve.conftest import PATIENCE, LiveServer, StartServer, wait_until
from tests.serve.test_replicas import POISON, Poisonable, outcome

FLEET = Path(__file__).parents[2] / "launch/fleet"


@pytest.fixture(scope="module")
def fleet() -> Any:
    """The script as a module."""
    require("haproxy")
    specification = importlib.util.spec_from_file_location("fleet", FLEET / "fleet.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["fleet"] = module
    specification.loader.exec_module(module)
    return module


class Servers:
    """Servers in threads, and HAProxy."""

    def __init__(
        self, fleet: Any, start: StartServer, model: GPT, count: int = 2, places: int = 256
    ) -> None:
        self.start, self.model = start, model
        ports = iter(free_ports(2 * count + 2))
        self.replicas = [fleet.Replica(number, next(ports), next(ports)) for number in range(count)]
        self.servers = [self.serve(replica) for replica in self.replicas]
        self.target, self.web = (f"127.0.0.1:{port}" for port in ports)
        self.balancer = fleet.Balancer(fleet.backends(self.replicas, places), self.target, self.web)
        for replica in self.replicas:
            assert self.balancer.ready(replica.number)

    def serve(self, replica: Any) -> LiveServer:
        decoder = Poisonable(Decoder(self.model, max_slots=2, dtype="fp32"))
        return self.start(
            decoder, port=replica.port, http_port=replica.http_port, max_connection_age=0
        )

    def restart(self, index: int) -> None:
        """As `Fleet.restart`."""
        self.balancer.drain(index)
        self.servers[index].call(self.servers[index].server.drain())
        self.servers[index] = self.serve(self.replicas[index])
        self.balancer.ready(index)


@pytest.fixture
def several(fleet: Any, start: StartServer, model: GPT, request: Any) -> Iterator[Servers]:
    made = Servers(fleet, start, model, *getattr(request, "param", ()))
    yield made
    made.balancer.close()


@pytest.mark.slow(5)
@pytest.mark.parametrize("several", [(2,), (3,)], indirect=True)
def test_rolling_restarts_lose_no_call(several: Servers) -> None:
    outcomes: Counter[str] = Counter()
    stop = threading.Event()
    body = {"prompt": "to be", "max_tokens": 5, "ignore_eos": True}

    def ask() -> None:
        with Client(several.target) as client:
            while not stop.is_set():
                try:
                    pieces = list(client.stream([1, 2], max_new_tokens=5, ignore_eos=True))
                    tokens = sum(len(piece.token_ids) for piece in pieces)
                    outcomes["OK" if tokens == 5 else f"{tokens} tokens"] += 1
                except grpc.RpcError as error:
                    outcomes[f"{error.code().name} {error.details()}"] += 1

    def fetch() -> None:
        with httpx.Client(base_url=f"http://{several.web}", timeout=PATIENCE) as client:
            while not stop.is_set():
                answer = client.post("/v1/completions", json=body)
                outcomes["HTTP" if answer.status_code == 200 else answer.text] += 1

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(work) for work in (ask, ask, ask, fetch)]
        try:
            for index in (*range(len(several.servers)), 0):
                before = outcomes.copy()
                wait_until(
                    lambda: all(outcomes[kind] > before[kind] + 10 for kind in ("OK", "HTTP"))  # noqa: B023
                )
                several.restart(index)
        finally:
            stop.set()
        for each in asking:
            each.result(PATIENCE)
    assert set(outcomes) == {"OK", "HTTP"}, outcomes


def test_a_body_that_comes_after_its_head_is_sent_to_another_server(several: Servers) -> None:
    host, port = several.web.split(":")
    body = b'{"prompt": "to be", "max_tokens": 2}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"

    def fetch(_: int) -> bytes:
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            connection.sendall(head.encode())
            time.sleep(0.1)
            connection.sendall(body)
            return connection.recv(12)

    stopping = several.servers[0].server.service
    stopping.draining = True  # HAProxy finds out within half a second
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(fetch, range(8))) == [b"HTTP/1.1 200"] * 8
    finally:
        stopping.draining = False


@pytest.mark.slow(5)
def test_a_server_that_is_busy_for_seconds_gets_calls_all_the_same(several: Servers) -> None:
    several.balancer.drain(1)

    async def pause() -> None:
        time.sleep(2)  # four health checks

    pausing = several.servers[0].begin(pause())
    time.sleep(1.5)
    body = {"prompt": "to be", "max_tokens": 1}
    answer = httpx.post(f"http://{several.web}/v1/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    pausing.result(PATIENCE)


@pytest.mark.slow(5)
@pytest.mark.parametrize("several", [(2, 3), (3, 3)], indirect=True)
def test_full_servers_fail_no_call_while_another_has_room(several: Servers) -> None:
    *full, idle = several.servers
    request = build_request([1], max_new_tokens=2, ignore_eos=True)
    for server in full:
        server.scheduler.decoder.hold()
    with Client(several.target) as client:
        calls = [client._stub.Generate.future(request, timeout=PATIENCE) for _ in range(20)]
        wait_until(lambda: sum(call.done() for call in calls) >= 20 - 3 * len(full))
        for server in full:
            server.scheduler.decoder.release()
        assert [outcome(call) for call in calls] == ["OK"] * 20
    wait_until(lambda: all(server.open_calls == 0 for server in (*full, idle)))


def test_a_poisoned_request_ends_one_server(several: Servers) -> None:
    innocent = build_request([1, 2], max_new_tokens=3, ignore_eos=True)
    with Client(several.target) as client:
        poison = client._stub.Generate.future(build_request([POISON] * 20), timeout=PATIENCE)
        assert outcome(poison) == "ABORTED"
        failed = [server.engine.failure is not None for server in several.servers]
        assert sorted(failed) == [False, True]
        several.balancer.drain(failed.index(True))  # or within half a second, by its health
        calls = [client._stub.Generate.future(innocent, timeout=PATIENCE) for _ in range(10)]
        assert [outcome(call) for call in calls] == ["OK"] * 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 listens beyond this machine: give --tls-pem"),
        (["--host", "0.0.0.0", "--tls-pem", "x"], "give --auth-token-file"),
    ],
)
def test_exposure(fleet: Any, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fleet.main(flags)


def test_a_rolling_restart_ends_where_a_server_does_not_come_back(
    fleet: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model that cannot be loaded, one server is lost and not all of them."""
    commands = {0: ["sleep", "1000"], 1: ["false"], 2: ["sleep", "1000"]}
    calls: list[tuple[str, int]] = []

    class Balancer:
        def drain(self, number: int) -> None:
            calls.append(("drain", number))

        def ready(self, number: int, seconds: float) -> bool:
            calls.append(("ready", number))
            return seconds > 0

    class Replica(fleet.Replica):  # type: ignore[misc]
        @property
        def healthy(self) -> bool:
            assert self.process is not None
            return self.process.poll() is None and self.number != 1

    class Fleet(fleet.Fleet):  # type: ignore[misc]
        def start(self, replica: Any) -> Any:
            replica.process = subprocess.Popen(commands[replica.number])
            return replica.process

    replicas = [Replica(number, 0, 0) for number in range(3)]
    made = Fleet(replicas, [], Balancer())
    for replica in replicas:
        made.start(replica)
    last = replicas[2].process
    made.roll()
    made._end(replicas)
    assert replicas[2].process is last
    assert calls == [("drain", 0), ("ready", 0), ("drain", 1), ("ready", 1)]
    assert capsys.readouterr().out.startswith("server 1 did not come back;")


def test_one_server_a_gpu_or_socket(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(fleet.places(3)) == 3
    monkeypatch.setattr(fleet.shutil, "which", lambda name: name)
    listed = fleet.subprocess.CompletedProcess([], 0, "GPU 0: a\nGPU 1: b\n")
    monkeypatch.setattr(fleet.subprocess, "run", lambda *_, **__: listed)
    assert fleet.places(None) == [([], {"CUDA_VISIBLE_DEVICES": each}) for each in "01"]
    nodes = [Path("node0"), Path("node1")]
    monkeypatch.setattr(fleet.Path, "glob", lambda *_: nodes)
    listed.stdout = ""
    assert fleet.places(None)[1] == (["numactl", "--cpunodebind=1", "--membind=1"], {})


def test_compose_uses_the_same_configuration(fleet: Any, tmp_path: Path) -> None:
    backends = tmp_path / "backends.cfg"
    backends.write_text(fleet.backends([fleet.Replica(0, 3, 4)]))
    compose = yaml.safe_load((FLEET / "compose.yaml").read_text())
    balancer = compose["services"]["haproxy"]
    text = (FLEET / "haproxy.cfg").read_text() + (FLEET / "backends.cfg").read_text()
    for name in balancer["environment"]:
        assert name in text
    command = ["haproxy", "-c", "-f", str(FLEET / "haproxy.cfg"), "-f", str(backends)]
    addresses = {"FLEET_GRPC": "127.0.0.1:1", "FLEET_HTTP": "127.0.0.1:2"}
    environment = os.environ | addresses | {"FLEET_SOCKET": str(tmp_path / "socket")}
    checked = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert checked.returncode == 0
    assert "[WARNING]" not in checked.stderr
    for part in (
        "balance leastconn",
        "http-check send meth GET uri /health",
        "proto h2 inter 500ms",
    ):
        assert part in text
        assert part in fleet.backends([])
