"""Run ``python -m MODULE …``, alone or as several ranks, in forks of a process that has torch.

That saves the seconds of CPU time that importing torch costs each process. Nothing else is shared:
a command has its own working directory, environment, output and exit status. Tests about the
launcher itself (``torchrun``, signals to it, its restarts) start real processes instead.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path

from tests import forks

ROOT = str(forks.ROOT)


def _become(_: Connection, module: str, arguments: list[str], cwd: str, outputs: list[str]) -> None:
    """Turn this fork into the command."""
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.path[:0] = [cwd, ROOT]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a fork ends without them


class Command:
    """A running command, used like ``subprocess.Popen``; its output goes to two files.

    Args:
        module: what would follow ``python -m``.
        arguments: its arguments.
        outputs: files for stdout and stderr; both may be the same.
        cwd: working directory; the caller's by default.
        env: the whole environment; the caller's by default.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        outputs: tuple[Path, Path],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        environment = dict(os.environ if env is None else env)
        search = [ROOT, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(search)  # for processes that it starts
        where = cwd or Path.cwd()
        self.fork = forks.Fork(
            _become, module, list(arguments), str(where), [str(path) for path in outputs],
            cwd=where, env=environment,
        )  # fmt: skip
        self.pid = self.fork.pid

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        return self.fork.poll()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> int:
        """Exit status; a command that takes longer than ``timeout`` seconds is killed."""
        if self.fork.poll(timeout) is None:
            self.send_signal(signal.SIGKILL)
        status = self.fork.poll(60)
        assert status is not None
        return status


def run(
    module: str, arguments: Sequence[str], cwd: Path, log: Path, timeout: float = 240
) -> tuple[int, str]:
    """Run a command to its end: exit status, and stdout and stderr together."""
    status = Command(module, arguments, (log, log), cwd).wait(timeout)
    return status, log.read_text(encoding="utf-8", errors="replace")


class Ranks:
    """A command as torchrun would start it: one process a rank, here without restarts.

    Args:
        module, arguments, cwd, env: as those of a `Command`.
        count: how many ranks; a single one gets no rendezvous.
        outputs: files for stdout and stderr of all ranks.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        count: int,
        outputs: tuple[Path, Path],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.arguments, self.outputs = [module, *arguments], outputs
        environment = dict(os.environ if env is None else env)
        self._store, shared = None, [{}]
        if count > 1:
            self._store, shared = _rendezvous(count)
            environment.setdefault("OMP_NUM_THREADS", "1")
        self.commands = [
            Command(module, arguments, outputs, cwd, environment | own) for own in shared
        ]

    def poll(self) -> int | None:
        """Exit status once all ranks have ended, None before."""
        running = any(command.poll() is None for command in self.commands)
        return None if running else self._status()

    def wait(self, timeout: float = 240) -> int:
        """Exit status: of several ranks 0 or, as torchrun's, 1. One that fails ends the others."""
        deadline = time.monotonic() + timeout
        while running := [command for command in self.commands if command.poll() is None]:
            ends = [command.fork.connection for command in running]
            wait(ends, max(0.0, deadline - time.monotonic()))
            if any(command.poll() for command in self.commands) or time.monotonic() > deadline:
                for command in running:
                    command.send_signal(signal.SIGKILL)
                    command.wait()
        return self._status()

    def completed(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait; then status and output."""
        status = self.wait(timeout)
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in self.outputs]
        return subprocess.CompletedProcess(self.arguments, status, *texts)

    def _status(self) -> int:
        if len(self.commands) == 1:
            return self.commands[0].wait()
        return int(any(command.poll() for command in self.commands))


def _rendezvous(count: int) -> tuple[object, list[dict[str, str]]]:
    """A store, which has to live as long as the ranks, and the environment of each rank."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "warm",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    return store, [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(count))]


def run_ranks(
    module: str,
    arguments: Sequence[str],
    ranks: int = 1,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a command on so many ranks to its end, with its status and output."""
    with tempfile.TemporaryDirectory() as name:
        outputs = Path(name, "stdout"), Path(name, "stderr")
        return Ranks(module, arguments, ranks, outputs, cwd, env).completed(timeout)


SHIM = """#!{python}
import os, sys
from multiprocessing.connection import Client
flag, module, *arguments = sys.argv[1:]
assert flag == "-m", sys.argv
with Client({address!r}) as connection:
    connection.send((module, arguments, os.getcwd(), dict(os.environ)))
    status, output = connection.recv()
sys.stdout.write(output)
sys.exit(status)
"""


@contextlib.contextmanager
def python(directory: Path) -> Iterator[Path]:
    """A program that is called as ``python -m MODULE …`` is, and has a warm fork run the module.

    It is for notebooks and scripts that start many processes. It prints stdout and stderr
    together when the module has ended.
    """
    program = directory / "python"
    with Listener(family="AF_UNIX") as listener:
        address = str(listener.address)
        program.write_text(SHIM.format(python=sys.executable, address=address), encoding="utf-8")
        program.chmod(0o755)

        def answer(connection: Connection) -> None:
            with connection, tempfile.TemporaryDirectory() as name:
                module, arguments, cwd, environment = connection.recv()
                log = Path(name, "log")
                command = Command(module, arguments, (log, log), Path(cwd), environment)
                status = command.wait()
                connection.send((status, log.read_text(encoding="utf-8", errors="replace")))

        def serve() -> None:
            while not stopping.is_set():
                connection = listener.accept()
                if not stopping.is_set():
                    threading.Thread(target=answer, args=(connection,)).start()

        stopping = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield program
        finally:
            stopping.set()
            Client(address).close()  # wakes the thread
            thread.join()
