"""Ending with the torchrun agent that started this process.

A killed agent otherwise leaves workers that go on stepping and writing, or wait for minutes for a
store that went with it. Imports nothing heavy, so that it can be called first of all.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""Of Linux' ``prctl``: the signal to get when the parent dies."""

AGENT_GRACE = 30.0
"""Seconds to wait for an agent that was told to end."""


def die_with_agent() -> None:
    """Tie this process to its parent, where that is a torchrun agent; elsewhere do nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The agent may have gone before that, and init adopted this process.
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
