"""How ranks find each other: a new key prefix for each restart.

torchrun's agent keeps its TCP store when it restarts the ranks (at least up to torch 2.13), and
torch uses the same keys there after each restart. A restarted rank can therefore read the address
of a dead one, and the run hangs or fails at random. So the ranks agree on a new prefix first.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from gpt_dist.errors import GptDistError, UsageError


def connect(*, host: bool = False, timeout: float = 300.0) -> Any:
    """Open a new connection to the store at ``MASTER_ADDR:MASTER_PORT``.

    Args:
        host: whether this process serves the store if no torchrun agent does.
        timeout: seconds to wait for the store and for a key in it.
    """
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=host and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=timeout),
    )


def meet(store: Any, rank: int, size: int, problem: str = "", patience: float = 1800.0) -> str:
    """Agree on a prefix for the keys of this start, and on whether all can start. Collective.

    Rank 0 makes the prefix. Every other rank says hello under a new random name, and rank 0
    answers to that name, so an answer from before a restart is never mistaken for a new one.

    Args:
        store: from ``connect``.
        rank: this rank.
        size: ranks in all.
        problem: why this rank cannot start; empty if it can.
        patience: seconds that rank 0 waits for the others.

    Raises:
        UsageError: on every rank, if some rank has a problem; the message is that problem.
        GptDistError: some ranks did not come.
    """
    prefix = uuid.uuid4().hex
    if rank:
        me = uuid.uuid4().hex
        store.set(f"hello/{store.add('hellos', 1)}", me)
        prefix = store.get(f"prefix-for/{me}").decode()
    if problem:
        where = f"rank {rank} on {socket.gethostname()}: " if rank else ""
        store.set(f"{prefix}/problem", where + problem)
    if rank:
        store.add(f"{prefix}/arrived", 1)
    else:
        _answer_hellos(store, prefix, size - 1, patience)
        found = store.get(f"{prefix}/problem") if store.check([f"{prefix}/problem"]) else b""
        store.set(f"{prefix}/verdict", found)
    verdict = store.get(f"{prefix}/verdict").decode()
    if verdict:
        raise UsageError(verdict)
    return prefix


def _answer_hellos(store: Any, prefix: str, expected: int, patience: float) -> None:
    """Rank 0's part: answer every hello, old ones too, until all other ranks have arrived."""
    deadline = time.monotonic() + patience
    seen = int(store.get("seen")) if store.check(["seen"]) else 0
    unanswered: set[int] = set()
    while (arrived := store.add(f"{prefix}/arrived", 0)) < expected:
        if time.monotonic() > deadline:
            raise GptDistError(f"only {arrived} of {expected} other ranks came in {patience:.0f} s")
        newest = store.add("hellos", 0)
        unanswered |= set(range(seen + 1, newest + 1))
        seen = newest
        for hello in sorted(unanswered):
            if store.check([f"hello/{hello}"]):
                store.set(f"prefix-for/{store.get(f'hello/{hello}').decode()}", prefix)
                unanswered.remove(hello)
        time.sleep(0.01)
    store.set("seen", str(seen))
