"""Run a function on several ranks, in forks of a process that has imported torch already."""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from tests.warm import PRELOAD


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends, processes = [], []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(theirs, rank, size, store.port, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    results: list[Any] = []
    try:
        for rank, end in enumerate(ends):
            assert end.poll(timeout), f"rank {rank} did not end in {timeout:.0f} s"
            problem, result = end.recv()
            assert not problem, f"rank {rank}:\n{problem}"
            results.append(result)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def _rank(
    end: Any, rank: int, size: int, port: int,
    function: Callable[..., Any], arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    from gpt_dist.parallel.world import start

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    values = (rank, rank, size, size, port)
    os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    gc.freeze()  # as in tests.warm
    try:
        with start("cpu") as world:
            result = function(world, *arguments)
        end.send(("", result))
    except BaseException:
        end.send((traceback.format_exc(), None))
    os._exit(0)  # a thread may still wait in torch's store
