"""A rank and the torchrun agent that started it end together.

A killed agent otherwise leaves workers that go on stepping and writing, or wait for minutes for a
store that went with it. An agent that is stuck otherwise keeps its node's part of the job alive.
Only the standard library is imported: a command calls this first of all, and ``watch_agent`` runs
this file as a script.
"""

from __future__ import annotations

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
            [sys.executable, "-I", "-S", __file__]
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


def parent_of(process: int) -> int | None:
    """The parent of a process (Linux), None where there is no such process."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[1])  # the name in parentheses may hold spaces


if __name__ == "__main__":
    end_stuck_agent(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
