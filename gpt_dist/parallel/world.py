"""The process group and the world: who this rank is, where it runs, and how ranks agree."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gpt_dist.errors import GptDistError, UsageError, describe
from gpt_dist.parallel.nccl import set_nccl
from gpt_dist.parallel.rendezvous import connect, meet
from gpt_dist.parallel.roll_call import RollCall

T = TypeVar("T")

LINGER = 1.0
"""Seconds that the ranks on the host of torchrun's store wait at the end of a run."""

STARTUP_TIMEOUT = 1800.0
"""Seconds a collective may take during start-up, where ranks compile and open data."""


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is world rank 0, which decides, writes and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank gets the same answer."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        if self.size > 1:
            self.all_reduce(torch.zeros((), device=self.device)).item()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every rank; if it fails on any, all ranks raise the same error.

        Raises:
            GptDistError: the first rank's error, on every rank (rank 0 prints it).
        """
        result, failure, cause = None, None, None
        try:
            result = work()
        except (GptDistError, OSError) as error:
            status = error.exit_status if isinstance(error, GptDistError) else 1
            where = f"rank {self.rank} on {socket.gethostname()}: " if self.rank else ""
            failure, cause = (status, where + describe(error)), error
        for found in self.gather(failure):
            if found:
                raise (UsageError if found[0] == 2 else GptDistError)(found[1]) from cause
        return cast(T, result)

    def decide(self, work: Callable[[], T]) -> T | None:
        """Do something on rank 0 alone (None elsewhere); where it fails, all ranks fail."""
        return self.together(lambda: work() if self.is_main else None)

    def set_timeout(self, seconds: float) -> None:
        """From now on, end the run when a collective takes longer than this."""
        if self.size > 1:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def env_world_size() -> int:
    """Ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this rank.

    Raises:
        UsageError: the device is not there, or there are more ranks than devices.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise UsageError("device = cuda: this torch sees no CUDA device; valid here: cpu")
        if local_rank >= count:
            raise UsageError(
                f"device = cuda: rank {local_rank} of this node has no GPU, the node has {count}; "
                f"start torchrun with --nproc_per_node={count}"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device = mps: not available on this machine; valid here: cpu")
    return torch.device(name)


@contextmanager
def start(device_name: str) -> Iterator[World]:
    """Join the process group that torchrun describes, or stand alone; leave it at the end."""
    rank, size = int(os.environ.get("RANK", "0")), env_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device, problem = torch.device("cpu"), ""
    try:
        if size > 1:
            check_interfaces()
        device = pick_device(device_name, local_rank)
    except UsageError as error:
        if size == 1:
            raise
        problem = str(error)  # the other ranks must hear of it, else they would wait for this one
    # torchrun sets OMP_NUM_THREADS=1 by itself; only without it does the variable mean a wish.
    if device.type == "cpu" and (local_size > 1 or "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(max(1, available_cpus() // local_size))
    world = World(rank, size, local_rank, local_size, device)
    roll_call = None
    if size > 1:
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            set_nccl()
        store = connect(host=rank == 0, timeout=STARTUP_TIMEOUT)
        prefix = meet(store, rank, size, problem, STARTUP_TIMEOUT)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(prefix, store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=STARTUP_TIMEOUT),
            device_id=device if device.type == "cuda" else None,
        )
        roll_call = RollCall(rank, size, prefix)
    try:
        yield world
    except RuntimeError as error:
        if roll_call and is_communication_error(error):
            raise roll_call.explain(error) from error
        raise
    finally:
        # A rank that fails must not wait for the others here: torchrun ends them.
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()
            if size > local_size and os.environ.get("GPT_DIST_LEAVE_LAST"):
                # torchrun's agent here holds the store that the others still ask at their end;
                # one that finds it gone logs a traceback after a good run.
                time.sleep(LINGER)


def is_communication_error(error: RuntimeError) -> bool:
    """Whether gloo or NCCL raised it (gloo's errors have no class of their own)."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def available_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_interfaces() -> None:
    """Name a network interface that the environment asks for and the machine does not have.

    Raises:
        UsageError: GLOO_SOCKET_IFNAME names no interface of this machine.
    """
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    present = [name for _, name in socket.if_nameindex()]
    missing = [name for name in wanted.split(",") if name and name not in present]
    if missing:
        raise UsageError(
            f"GLOO_SOCKET_IFNAME = {wanted}: {socket.gethostname()} has no interface "
            f"{missing[0]}; it has {', '.join(present)}"
        )
