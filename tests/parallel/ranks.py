"""Run a function on several ranks, in forks of a process that has imported torch already."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from tests import forks


def on_ranks(
    function: Callable[..., Any], *arguments: Any, size: int = 2, timeout: float = 300
) -> list[Any]:
    """Call ``function(world, *arguments)`` on every rank; what each returned, in their order.

    Args:
        function: at the top of a module, so that the ranks can import it.
        arguments: pickled, as the results are.

    Raises:
        AssertionError: a rank failed, or did not end in time.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [forks.Fork(_rank, rank, size, store.port, function, arguments) for rank in range(size)]
    results: list[Any] = []
    try:
        for number, rank in enumerate(ranks):
            assert rank.connection.poll(timeout), f"rank {number} did not end in {timeout:.0f} s"
            answer = rank.connection.recv()
            assert isinstance(answer, tuple), f"rank {number} ended with status {answer}"
            problem, result = answer
            assert not problem, f"rank {number}:\n{problem}"
            results.append(result)
    finally:
        for rank in ranks:
            rank.kill()
    return results


def _rank(
    end: Connection, rank: int, size: int, port: int,
    function: Callable[..., Any], arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    from gpt_dist.parallel.world import start

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    values = (rank, rank, size, size, port)
    os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        with start("cpu") as world:
            result = function(world, *arguments)
        end.send(("", result))
    except BaseException:
        end.send((traceback.format_exc(), None))
    os._exit(0)  # a thread may still wait in torch's store
