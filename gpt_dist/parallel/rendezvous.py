"""How ranks meet anew after a restart: a fresh corner of a store that remembers earlier lives.

torchrun's agent keeps its TCP store when it restarts the ranks (torch 2.13 at the least), and torch
looks its keys up there without telling the lives apart. A restarted rank may so read where a dead
one listened, and the run hangs or fails at random. Therefore ranks agree on a new prefix first.
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
    """A connection of its own to the store at ``MASTER_ADDR:MASTER_PORT``.

    Args:
        host: whether this process opens the store, where no torchrun agent does.
        timeout: seconds to wait for the store, and for a key in it.
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
    """Agree on a prefix for this life's keys, and on whether all can start. Collective.

    Every other rank says hello under a name of its own, so that no answer to an earlier life can
    be taken for one to this; rank 0 answers each with the prefix that it made up.

    Args:
        store: from ``connect``.
        rank: this rank.
        size: ranks in all.
        problem: why this rank cannot take part, if so.
        patience: seconds that rank 0 waits for the others.

    Raises:
        UsageError: on every rank, with the problem of one that has one.
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
    """Rank 0's part: answer every hello, also those of the dead, until all living ones are here."""
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
