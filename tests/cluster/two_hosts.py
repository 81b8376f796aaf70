"""Two hosts on one: network namespaces joined by a cable (a veth pair) that can be cut.

Needs root and iproute2. A process inside sees only its own loopback and one end of the cable, as on
two machines with a network between them. The hosts are named ``host-a`` and ``host-b``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar


def obstacle() -> str | None:
    """Why this machine cannot have two such hosts; None if it can."""
    if shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        return "no `ip` (Debian: iproute2)"
    if os.geteuid():
        return "network namespaces need root"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class TwoHosts:
    """Context manager: hosts ``a`` (10.77.0.1) and ``b`` (10.77.0.2), interface ``wire``."""

    addresses: ClassVar = {"a": "10.77.0.1", "b": "10.77.0.2"}
    interface = "wire"

    def __init__(self) -> None:
        self.namespaces = {host: f"host-{host}-{os.getpid()}" for host in self.addresses}
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TwoHosts:
        try:
            for namespace in self.namespaces.values():
                ip("netns", "add", namespace)
            a, b = self.namespaces.values()
            ip("link", "add", self.interface, "netns", a, "type", "veth",
               "peer", "name", self.interface, "netns", b)  # fmt: skip
            for host, namespace in self.namespaces.items():
                ip("-n", namespace, "address", "add", f"{self.addresses[host]}/24",
                   "dev", self.interface)  # fmt: skip
                ip("-n", namespace, "link", "set", "lo", "up")
            self.restore()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in self.namespaces.values():
            self._kill_all(namespace)
        for process in self.processes:
            process.wait()
        for namespace in self.namespaces.values():
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)

    @staticmethod
    def _kill_all(namespace: str) -> None:
        found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        for pid in found.stdout.split():
            subprocess.run(["kill", "-KILL", pid], capture_output=True)

    def pids(self, host: str) -> list[int]:
        """Every process on the host."""
        return [int(pid) for pid in ip("netns", "pids", self.namespaces[host]).split()]

    def vanish(self, host: str) -> None:
        """The host loses power: the cable is dead, and every process on the host is killed."""
        self.cut()
        self._kill_all(self.namespaces[host])

    def cut(self) -> None:
        """Pull the cable: no packet gets through, and no end of a connection either."""
        for namespace in self.namespaces.values():
            ip("-n", namespace, "link", "set", self.interface, "down")

    def restore(self) -> None:
        for namespace in self.namespaces.values():
            ip("-n", namespace, "link", "set", self.interface, "up")

    def start(
        self, host: str, command: list[str], log: Path, *, cwd: Path, env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host; its output is appended to ``log``."""
        named = ["unshare", "--uts", "bash", "-c", f'hostname host-{host} && exec "$@"', "bash"]
        with log.open("ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespaces[host], *named, *command],
                env=os.environ | env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process


def ip(*arguments: str) -> str:
    """Run iproute2's ``ip``; return its output."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
