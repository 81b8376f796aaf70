"""A rank and the torchrun agent that started it end together.

A killed agent otherwise leaves workers that go on stepping and writing, or wait for minutes for a
store that went with it. An agent that is stuck otherwise keeps its node's part of the job alive.
Only the standard library is imported: a command calls this first of all, and ``watch_agent`` runs
this file as a script.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""The option of Linux's ``prctl`` that sets the signal to get when the parent dies."""

AGENT_PATIENCE = 15.0
"""Seconds that a torchrun agent has to notice the end of its worker."""

AGENT_GRACE = 30.0
"""Seconds to wait for an agent that was told to end."""


def die_with_agent() -> None:
    """End this process when its parent ends, if that is a torchrun agent."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The agent may have died before that, and init have adopted this process.
        if os.getppid() != parent or (parent == 1 and not is_agent(parent)):
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def agent_id() -> str:
    """A name of the torchrun agent that started this process, of this one alone; "" without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    agent, started = os.getppid(), ""
    if sys.platform == "linux":  # process ids are used again, in containers always the same ones
        stat = Path(f"/proc/{agent}/stat").read_text()
        started = stat.rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}:{agent}:{started}"


def stop_agent() -> None:
    """End the whole job if this is a node's first rank under a torchrun that would restart it.

    torchrun knows no exit status that means "do not restart", so each node's agent is told to end.
    It ends this process first, with the other ranks of the node, and exits with status 1.
    """
    agent = os.getppid()
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("LOCAL_RANK") == "0" and is_agent(agent):
        os.kill(agent, signal.SIGTERM)
        time.sleep(AGENT_GRACE)


def is_agent(process: int) -> bool:
    """Whether a process was started as torchrun (``torchrun`` or ``-m torch.distributed.run``)."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return b"torch" in command


def watch_agent(patience: float = AGENT_PATIENCE) -> None:
    """Kill the torchrun agent if it does not notice that this process, its worker, has ended.

    An agent that is cut off from the host of the rendezvous blocks in the kernel's TCP for a
    quarter of an hour, without handling signals; the job would hang for that long.

    Args:
        patience: seconds that it has.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        subprocess.Popen(
            # Without site-packages: Python starts in 20 ms.
            [sys.executable, "-I", "-S", __file__, "watch"]
            + [str(value) for value in (os.getppid(), os.getpid(), patience)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def end_stuck_agent(agent: int, worker: int, patience: float) -> bool:
    """Wait until an agent has reaped its worker; kill the agent if it does not in time.

    Args:
        agent: process id of the agent, the parent of ``worker``.
        worker: process id of a worker that ends, or has ended.
        patience: seconds to wait.

    Returns:
        Whether the agent was killed.
    """
    deadline = time.monotonic() + patience
    while parent_of(worker) == agent:
        if time.monotonic() > deadline:
            print(
                f"error: torchrun ({agent}) is stuck on a dead connection: killing it",
                file=sys.stderr,
            )
            os.kill(agent, signal.SIGKILL)
            return True
        time.sleep(0.2)
    return False


def print_after_agent(text: str) -> None:
    """Print a text on standard error after the last output of the torchrun agent.

    An agent that gets Ctrl-C ends its workers, then prints a traceback and ends. Nothing that a
    worker prints can come after that, so another process does it.
    """
    place = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, "print", str(os.getppid()), *place, text],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_end(agent: int, store: tuple[str, int], patience: float = 2 * AGENT_GRACE) -> None:
    """Wait until an agent ends.

    Its store closes after its last output and some tenths of a second before the process is gone,
    so whoever waits for the store is earlier than the shell's prompt.

    Args:
        agent: process id of the agent.
        store: host and port of the store; it may be another process's.
        patience: seconds to wait at most.
    """
    deadline = time.monotonic() + patience

    def alive() -> bool:
        with contextlib.suppress(OSError):
            os.kill(agent, 0)
            return time.monotonic() < deadline
        return False

    with contextlib.suppress(OSError), socket.create_connection(store, timeout=1) as connection:
        connection.settimeout(0.1)
        while alive():
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1):
                    return
    while alive():
        time.sleep(0.05)


def parent_of(process: int) -> int | None:
    """The parent of a process (Linux), None where there is no such process."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[1])  # the name in parentheses may hold spaces


def main(task: str, agent: str, *rest: str) -> None:
    """What ``watch_agent`` and ``print_after_agent`` start."""
    if task == "watch":
        worker, patience = rest
        end_stuck_agent(int(agent), int(worker), float(patience))
    else:
        host, port, text = rest
        wait_for_end(int(agent), (host, int(port)))
        print(text, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
