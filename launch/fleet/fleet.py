#!/usr/bin/env python3
"""Serve a model from all GPUs or processor sockets of this machine, behind HAProxy.

    launch/fleet/fleet.py --checkpoint runs/mine
    launch/fleet/fleet.py --servers 2 --port 50051 --http-port 8000 --checkpoint runs/mine --watch

Each GPU, or else each socket, has a server of its own; HAProxy sends every call to the server that
has the fewest. Flags that this script does not know go to `python -m serve`. SIGHUP restarts the
servers one after another without losing a call. SIGTERM and Ctrl-C drain them all. A server that
ends by itself is started again. Needs haproxy (2.4 or newer), and numactl for several sockets.

HAProxy has the only open ports, the servers listen on the loopback interface. For them all calls
come from one host, so give callers tokens (--auth-token-file) to share the servers fairly.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt_dist.errors import GptDistError, Parser, UsageError, at_least, run_main
from serve.security import Access, check_exposure

PLACES = 256
"""Calls that a server takes at once, unless --max-slots and --max-queue say otherwise."""
WAITS = (1, 2, 4, 8, 16, 30)
"""Seconds until a server that has ended is started again, at its first end, its second, …"""
RESTARTED_WITHIN = 600
"""Seconds in which a server that is restarted must load its model."""
HERE = Path(__file__).resolve().parent


@dataclass
class Replica:
    """One server of the fleet."""

    number: int
    port: int
    http_port: int
    prefix: list[str] = field(default_factory=list)
    """What its command line begins with."""
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    ends: int = 0
    """How many times it has ended by itself."""
    due: float = 0.0
    """When to start it again."""

    @property
    def healthy(self) -> bool:
        """Whether it accepts calls."""
        url = f"http://127.0.0.1:{self.http_port}/health"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False


def backends(replicas: Sequence[Replica], places: int = PLACES) -> str:
    """HAProxy's configuration of the servers."""
    text = []
    for name, protocol in (("grpc", "proto h2"), ("http", "")):
        text += [
            f"backend {name}",
            "    balance leastconn",
            "    option httpchk",
            "    http-check connect default proto h1",
            "    http-check send meth GET uri /health",
            "    http-check expect status 200",
            f"    default-server {protocol} inter 500ms fall 1 rise 1 maxconn {places}",
        ]
        for replica in replicas:
            port = replica.port if name == "grpc" else replica.http_port
            text.append(
                f"    server s{replica.number} 127.0.0.1:{port} check port {replica.http_port}"
            )
    return "\n".join(text) + "\n"


class Balancer:
    """A running HAProxy.

    Args:
        configuration: of the backends.
        grpc: address that gRPC clients call, HOST:PORT.
        http: address that HTTP clients call.
        tls: certificate chain and key in one file (PEM); None for no encryption.
    """

    def __init__(self, configuration: str, grpc: str, http: str, tls: Path | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fleet-")
        directory = Path(self._directory.name)
        self.socket, file = directory / "socket", directory / "backends.cfg"
        file.write_text(configuration, encoding="utf-8")
        main = (HERE / "haproxy.cfg").read_text(encoding="utf-8")
        if tls:  # gRPC agrees on HTTP/2 in the handshake
            main = main.replace('GRPC}" proto h2', f'GRPC}}" ssl crt {tls} alpn h2')
            main = main.replace('HTTP}"', f'HTTP}}" ssl crt {tls}')
        settings = {"SOCKET": str(self.socket), "GRPC": grpc, "HTTP": http}
        for name, value in settings.items():
            main = main.replace(f"${{FLEET_{name}}}", value)
        front = directory / "haproxy.cfg"
        front.write_text(main, encoding="utf-8")
        self.process = subprocess.Popen(["haproxy", "-db", "-f", str(front), "-f", str(file)])
        wait_for(lambda: self.socket.exists() or self.process.poll() is not None, 30)
        if self.process.poll() is not None:
            raise GptDistError("haproxy ended: its message is above")

    def command(self, text: str) -> str:
        """Send a command to HAProxy; returns its answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            connection.sendall(text.encode() + b"\n")
            with connection.makefile(encoding="utf-8") as answer:
                return answer.read()

    def drain(self, number: int) -> None:
        """Send a server no more calls."""
        self._each(number, "drain")

    def ready(self, number: int, seconds: float = 60) -> bool:
        """Send a server calls again; returns whether HAProxy finds it healthy in this time."""
        self._each(number, "ready")

        def up() -> bool:
            rows = [line.split(",") for line in self.command("show stat").splitlines()]
            return sum(row[1:2] == [f"s{number}"] and row[17] == "UP" for row in rows) == 2

        return wait_for(up, seconds)

    def _each(self, number: int, state: str) -> None:
        for name in ("grpc", "http"):
            self.command(f"set server {name}/s{number} state {state}")

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()
        self._directory.cleanup()


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Poll until a condition holds; returns whether it did within this time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def places(count: int | None) -> list[tuple[list[str], dict[str, str]]]:
    """Prefix and environment of each server: one a GPU, or else one a socket."""
    gpus = 0
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
        gpus = listed.stdout.count("GPU ")
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    if gpus:
        total = count or gpus
        return [([], {"CUDA_VISIBLE_DEVICES": str(number % gpus)}) for number in range(total)]
    total = count or max(nodes, 1)
    if total == nodes > 1 and shutil.which("numactl"):
        bind = ["numactl", "--cpunodebind={0}", "--membind={0}"]
        return [([part.format(number) for part in bind], {}) for number in range(total)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // total))
    return [([], {"GPT_DIST_SERVE_THREADS": threads}) for _ in range(total)]


class Fleet:
    """The servers and their balancer.

    Args:
        replicas: the servers.
        flags: of each of them.
        balancer: sends them calls.
    """

    def __init__(self, replicas: list[Replica], flags: list[str], balancer: Balancer) -> None:
        self.replicas, self.flags, self.balancer = replicas, flags, balancer
        self._stopped = self._rolling = self._announced = False

    def start(self, replica: Replica) -> subprocess.Popen[bytes]:
        """Start a server."""
        # fmt: off
        command = [
            *replica.prefix, sys.executable, "-m", "serve", *self.flags,
            "--host", "127.0.0.1", "--port", str(replica.port),
            "--http-port", str(replica.http_port), "--max-connection-age", "0",
        ]
        # fmt: on
        replica.process = subprocess.Popen(command, env=os.environ | replica.environment)
        return replica.process

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        signal.signal(signal.SIGHUP, lambda *_: setattr(self, "_rolling", True))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stopped", True))
        for replica in self.replicas:
            self.start(replica)
        while not self._stopped:
            if self.balancer.process.poll() is not None:
                raise GptDistError("haproxy ended")
            for replica in self.replicas:
                self._revive(replica)
            if not self._announced and all(replica.healthy for replica in self.replicas):
                self._announced = True
                print(f"ready: {len(self.replicas)} servers", flush=True)
            if self._rolling:
                self._rolling = False
                self.roll()
            time.sleep(0.2)

    def _revive(self, replica: Replica) -> None:
        """Start a server again that has ended by itself, later each time."""
        assert replica.process is not None
        status = replica.process.poll()
        if status is None:
            return
        if status == 2 and not self._announced:
            raise UsageError(f"server {replica.number} refused its flags: its message is above")
        now = time.monotonic()
        if not replica.due:
            replica.due = now + WAITS[min(replica.ends, len(WAITS) - 1)]
            replica.ends += 1
            print(f"server {replica.number} ended with status {status}", flush=True)
        elif now > replica.due:
            replica.due = 0.0
            self.start(replica)

    def roll(self) -> None:
        """Restart one server after another, for as long as they come back."""
        for replica in self.replicas:
            if not self.restart(replica):
                if not self._stopped:
                    print(
                        f"server {replica.number} did not come back; those after it go on as "
                        "they were",
                        flush=True,
                    )
                return
        print("restarted", flush=True)

    def restart(self, replica: Replica) -> bool:
        """Replace a server by a new one, after its calls have ended.

        Returns:
            Whether the new one gets calls.
        """
        self.balancer.drain(replica.number)
        self._end([replica])
        process = self.start(replica)

        def decided() -> bool:
            return self._stopped or process.poll() is not None or replica.healthy

        wait_for(decided, RESTARTED_WITHIN)
        return self.balancer.ready(replica.number, 60 if replica.healthy else 0)

    def _end(self, replicas: list[Replica]) -> None:
        running = [replica.process for replica in replicas if replica.process is not None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in running:
            process.wait()

    def close(self) -> None:
        """Drain all servers, then end HAProxy."""
        self._end(self.replicas)
        self.balancer.close()


def main(argv: list[str] | None = None) -> None:
    """Serve until interrupted.

    Raises:
        UsageError: a flag is wrong, or a port would be exposed.
        GptDistError: haproxy is missing or ended.
    """
    parser = Parser(
        prog="fleet.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    port = at_least(1, int, 65535)

    def add(name: str, text: str, **given: Any) -> None:
        shown = "; default %(default)s" if given.get("default") else ""
        parser.add_argument(f"--{name}", help=text + shown, **given)

    add("servers", "how many; default: one for each GPU, or else for each socket",
        type=at_least(1, int), metavar="N")  # fmt: skip
    add("host", "where HAProxy listens", default="127.0.0.1")
    add("port", "for gRPC", type=port, default=50051)
    add("http-port", "for HTTP", type=port, default=8000)
    add("tls-pem", "certificate chain and key in one file", type=Path, metavar="FILE")
    add("allow-insecure", "trust the network: any --host without TLS", action="store_true")
    add("base-port", "the servers' own ports begin here", type=port, default=50061)
    options, flags = parser.parse_known_args(argv)
    access = Access(
        tls=options.tls_pem is not None,
        tokens=any(flag.partition("=")[0] == "--auth-token-file" for flag in flags),
        allow_insecure=options.allow_insecure,
    )
    check_exposure("--host", options.host, access, "--tls-pem", "--auth-token-file")
    if shutil.which("haproxy") is None:
        raise GptDistError("haproxy is not installed: it is in the package of this name")
    base = options.base_port
    replicas = [
        Replica(number, base + 2 * number, base + 2 * number + 1, prefix, environment)
        for number, (prefix, environment) in enumerate(places(options.servers))
    ]
    addresses = (f"{options.host}:{options.port}", f"{options.host}:{options.http_port}")
    balancer = Balancer(backends(replicas), *addresses, options.tls_pem)
    fleet = Fleet(replicas, flags, balancer)
    try:
        fleet.run()
    finally:
        fleet.close()


if __name__ == "__main__":
    run_main(main)
