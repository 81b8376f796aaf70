"""How ranks meet anew after a restart: a fresh corner of a store that remembers earlier lives.

torchrun's agent keeps its TCP store when it restarts the ranks (torch 2.13 at the least), and torch
looks its keys up there without telling the lives apart. A restarted rank may so read where a dead
one listened, and the run hangs or fails at random. Therefore ranks agree on a new prefix first.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist


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


def meet(store: Any, rank: int, size: int) -> str:
    """Agree on a prefix for this life's keys. Collective.

    Every other rank says hello under a name of its own, so that no answer to an earlier life can
    be taken for one to this; rank 0 answers each with the prefix that it made up.
    """
    if rank:
        me = uuid.uuid4().hex
        store.set(f"hello/{store.add('hellos', 1)}", me)
        prefix: str = store.get(f"prefix-for/{me}").decode()
        store.add(f"{prefix}/arrived", 1)
        return prefix
    prefix = uuid.uuid4().hex
    seen = int(store.get("seen")) if store.check(["seen"]) else 0
    unanswered: set[int] = set()
    while store.add(f"{prefix}/arrived", 0) < size - 1:
        newest = store.add("hellos", 0)
        unanswered |= set(range(seen + 1, newest + 1))
        seen = newest
        for hello in sorted(unanswered):
            if store.check([f"hello/{hello}"]):
                store.set(f"prefix-for/{store.get(f'hello/{hello}').decode()}", prefix)
                unanswered.remove(hello)
        time.sleep(0.01)
    store.set("seen", str(seen))
    return prefix
