"""Compile the blocks, and run the passes that come before the first step.

Compiling, failing to compile and running out of device memory all happen here, before a run has
written anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from gpt_dist.config.settings import Config
from gpt_dist.data.loader import Batch
from gpt_dist.errors import GptDistError
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.engine import Engine
from gpt_dist.parallel.world import World

AUTOMATIC = ("cuda",)
"""Devices on which ``train.compile: auto`` compiles."""


def compile_blocks(model: GPT, world: World, config: Config, dtype: torch.dtype) -> str:
    """Compile the blocks in place as ``train.compile`` says, and try them. Collective.

    Only the blocks are compiled: one compilation serves all of them, and gradients are reduced
    while the backward pass goes on. They are tried on the bare model, where no rank waits for
    another, in the passes of a run: forward and backward in training, forward in validation,
    with the run's shape and dtype. So the steps find everything compiled, and where one rank
    fails, all of them go on without compiling.

    Args:
        model: in training mode, on its device, not yet owned by an engine.
        dtype: arithmetic of the matrix products.

    Returns:
        What was done, and why where it was not: a phrase for the run's headline.

    Raises:
        GptDistError: compiling was demanded and failed.
    """
    setting = config.train.compile
    if not setting or not len(model.h):
        return "eager"
    if setting == "auto" and world.device.type not in AUTOMATIC:
        return "eager"
    if config.parallel.shards_weights:
        return "eager (ZeRO-3 gathers weights between the operations that would be fused)"
    import torch._dynamo  # seconds

    # Dynamo would split a block where DDP's gradient buckets end; blocks overlap enough already.
    torch._dynamo.config.optimize_ddp = False
    for block in model.h:
        # On the instance: a wrapper around the block would rename its parameters.
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
    try:
        world.together(lambda: _rehearse(model, world, config, dtype))
    except GptDistError as error:
        if setting is True:
            raise GptDistError(f"train.compile = true: {error}") from error
        for block in model.h:
            del block.forward
        return f"eager (torch.compile failed: {error})"
    return "compiled"


def _rehearse(model: GPT, world: World, config: Config, dtype: torch.dtype) -> None:
    """The passes of a step and of a validation, on one micro-batch of this rank."""
    micro_batch, _ = config.micro_batch(world.size)
    shape = micro_batch, config.model.context_length
    ids = torch.zeros(shape, dtype=torch.long, device=world.device)

    def forward() -> Tensor:
        with torch.autocast(world.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss: Tensor = model(ids, ids)
        return loss

    try:
        with keeping_rng(world.device):
            forward().backward()
            model.eval()
            with torch.no_grad():
                forward()
    except Exception as error:  # compilers fail in many ways, all of them worth going on without
        raise GptDistError(" ".join(str(error).split())[:160] or type(error).__name__) from error
    finally:
        model.train()
        model.zero_grad()


@contextmanager
def uncompiled(model: GPT) -> Iterator[None]:
    """Run the blocks without their compiled form, for batches of shapes that do not come again."""
    compiled = {block: vars(block).pop("forward", None) for block in model.h}
    try:
        yield
    finally:
        for block, forward in compiled.items():
            if forward is not None:
                block.forward = forward  # type: ignore[method-assign]


def warm_up(engine: Engine, world: World, config: Config, batch: Batch) -> None:
    """Let the engine make its discarded passes before the first step. Collective.

    Raises:
        GptDistError: a micro-batch does not fit into the device's memory.
    """
    try:
        with keeping_rng(world.device):
            engine.warm_up(batch)
    except RuntimeError as error:  # MPS has no class of its own for this
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        found = GptDistError(
            f"rank {world.rank}: a micro-batch of {len(batch.ids)} sequences does not fit into "
            f"the memory of {world.device}; lower train.micro_batch_size "
            f"({config.train.micro_batch_size}), or see docs/troubleshooting.md"
        )
        found.local = True
        raise found from error


def keeping_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restore the state of the random generators afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
