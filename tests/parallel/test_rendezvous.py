"""Ranks meet in a store that still holds the keys of earlier starts."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.parallel.rendezvous import connect, meet


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


def life(size: int) -> list[str]:
    """Start all ranks once, each with its own connection."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: meet(connect(timeout=20), rank, size), range(size)))


def test_every_life_has_a_prefix_of_its_own(store: Any) -> None:
    lives = [life(size) for size in (3, 3, 2, 4)]
    assert all(len(set(prefixes)) == 1 for prefixes in lives)
    assert len({prefixes[0] for prefixes in lives}) == len(lives)


def test_a_problem_on_one_rank_is_everybodys(store: Any) -> None:
    def start(rank: int) -> str:
        with pytest.raises(UsageError) as raised:
            meet(connect(timeout=20), rank, 3, "no such interface" if rank == 2 else "")
        return str(raised.value)

    with ThreadPoolExecutor(3) as pool:
        messages = set(pool.map(start, range(3)))
    assert len(messages) == 1
    assert re.fullmatch(r"rank 2 on \S+: no such interface", messages.pop())
    assert len(set(life(3))) == 1  # and the next start has no problem


@pytest.mark.slow(2)
def test_missing_ranks_are_not_waited_for_forever(store: Any) -> None:
    with pytest.raises(GptDistError, match="only 0 of 1 other ranks came in 1 s"):
        meet(connect(timeout=20), 0, 2, patience=1)


def test_ranks_that_died_while_meeting_do_no_harm(store: Any) -> None:
    store.set(f"hello/{store.add('hellos', 1)}", "said hello to a rank 0 that never came")
    store.add("hellos", 1)  # took a number and died before saying hello
    assert len(set(life(3))) == 1
    assert len(set(life(2))) == 1
