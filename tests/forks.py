"""One process that has imported torch, for all workers: what tests start are forks of it.

To import torch, DeepSpeed and the rest takes ten seconds of CPU time. The first test that needs a
fork starts ``python -m tests.forks SOCKET OWNER``: that imports them once, then forks for whoever
asks until the process OWNER, the test session, has ended.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

PRELOAD = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",  # DeepSpeed needs it
    "tests.warm_deepspeed",
    "numpy",
    "safetensors.torch",
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "gpt_dist.training.trainer",
    "gpt_dist.inference.decoder",
]
"""Not what reads the environment when it is imported, as huggingface_hub does."""
ROOT = Path(__file__).resolve().parents[1]
SESSION = "GPT_DIST_TEST_SESSION"
"""Environment variable: the directory of the session's socket."""
OWNER = "GPT_DIST_TEST_OWNER"
"""Environment variable: the process id of the session."""


class Fork:
    """A function that runs in a process of its own.

    Args:
        function: at the top of a module. Its first argument is a connection, which leads to
            ``connection`` here; what it raises is printed, and ``SystemExit`` is its status.
        arguments: its other arguments, pickled.
        cwd: working directory; the caller's by default.
        env: the whole environment; the caller's by default.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        environment = dict(os.environ if env is None else env)
        self.connection = _connect()
        self.connection.send((function, arguments, str(cwd or Path.cwd()), environment))
        self.pid: int = self.connection.recv()
        self.status: int | None = None

    def poll(self, timeout: float = 0.0) -> int | None:
        """Exit status, or None if it still runs after ``timeout`` seconds."""
        if self.status is None and self.connection.poll(timeout):
            self.status = self.connection.recv()
            self.connection.close()
        return self.status

    def kill(self) -> None:
        """End it."""
        self.connection.close()


def _connect() -> Connection:
    address = Path(os.environ[SESSION], "socket")
    with FileLock(address.with_suffix(".lock")):
        if not address.exists():
            command = [sys.executable, "-m", "tests.forks", str(address), os.environ[OWNER]]
            server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
            while not address.exists():
                assert server.poll() is None, "the process for forks ended"
                time.sleep(0.05)
    return Client(str(address), family="AF_UNIX")


def _serve(address: Path, owner: int) -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    gc.freeze()  # forks need not look through it again and again
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address.with_suffix(".new")))
    listener.listen(64)
    address.with_suffix(".new").rename(address)
    running: dict[int, Connection] = {}
    while _exists(owner):
        ready = wait([listener, woken, *running.values()], timeout=2)
        for pid, connection in list(running.items()):
            gone = connection in ready  # the caller
            if gone:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if gone else os.WNOHANG)
            if ended:
                del running[pid]
                with connection, contextlib.suppress(OSError):
                    connection.send(os.waitstatus_to_exitcode(status))
        if woken in ready:
            woken.recv(4096)
        if listener in ready:
            connection = Connection(listener.accept()[0].detach())
            request = connection.recv_bytes()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for inherited in (listener, woken, wake, *running.values()):
                    inherited.close()
                _become(connection, request)
            running[pid] = connection
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _become(connection: Connection, request: bytes) -> NoReturn:
    """Run the function of a request in this fork, and exit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.send(os.getpid())
    status: Any = 0
    try:
        function, arguments, cwd, environment = pickle.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        function(connection, *arguments)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an exit does
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
