"""Compile the model, and run the passes that come before the first step.

Compiling, failing to compile and running out of device memory all happen here, before a run has
written anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gpt_dist.config.settings import Config
from gpt_dist.data.loader import Batch
from gpt_dist.errors import GptDistError
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.engine import Engine
from gpt_dist.parallel.world import World

AUTOMATIC = ("cuda",)
"""Devices on which ``train.compile: auto`` compiles."""


def compile_blocks(model: GPT, world: World, config: Config, dtype: torch.dtype) -> str:
    """Compile the model in place as ``train.compile`` says, and try it. Collective.

    With several ranks each block is compiled: one compilation serves all of them, and gradients
    are reduced while the backward pass goes on. One process compiles all blocks as one graph, so
    that what ends a block is fused with what begins the next. The graphs are tried on the bare
    model, where no rank waits for another, in the passes of a run: forward and backward in
    training, forward in validation, with the run's shape and dtype. So the steps find everything
    compiled, and where one rank fails, all of them go on without compiling.

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
    for module, name in _compiled(model, whole=world.size == 1 and not _split(config)):
        # On the instance: a wrapper around the module would rename its parameters.
        setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
    try:
        world.together(lambda: _rehearse(model, world, config, dtype))
    except GptDistError as error:
        if setting is True:
            raise GptDistError(f"train.compile = true: {error}") from error
        _eager(model)
        return f"eager (torch.compile failed: {error})"
    return "compiled"


def _split(config: Config) -> bool:
    """Whether something happens between two blocks."""
    return config.model.activation_checkpointing or config.parallel.strategy == "deepspeed"


def _compiled(model: GPT, *, whole: bool) -> list[tuple[nn.Module, str]]:
    """Modules and their methods that are graphs."""
    return [(model, "trunk")] if whole else [(block, "forward") for block in model.h]


def _eager(model: GPT) -> dict[tuple[nn.Module, str], Any]:
    """Take the graphs away; returns them."""
    found = {}
    for whole in (True, False):
        for module, name in _compiled(model, whole=whole):
            if name in vars(module):
                found[module, name] = vars(module).pop(name)
    return found


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
    """Run the model without its graphs, for batches of shapes that do not come again."""
    compiled = _eager(model)
    try:
        yield
    finally:
        for (module, name), graph in compiled.items():
            setattr(module, name, graph)


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
