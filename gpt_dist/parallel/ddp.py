"""The training step with a whole copy of the model on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gpt_dist.config.settings import Config
from gpt_dist.data.loader import Batch
from gpt_dist.model.gpt import GPT
from gpt_dist.ops import fused_accumulation
from gpt_dist.optim.adamw import global_norm
from gpt_dist.optim.spikes import make_spikes
from gpt_dist.parallel.copies import CopiedState, make_optimizer
from gpt_dist.parallel.engine import Reader, guard_step, load_spikes, set_rates, spikes_state
from gpt_dist.parallel.world import World

FUSED = ("cpu", "cuda")
"""Devices whose products can add to a gradient."""


class DDPEngine:
    """A whole copy on every rank; DistributedDataParallel averages the gradients.

    Args:
        model: on its device; from now on the engine owns it.
        world: the ranks that share a step.
        config: the run's configuration.
        dtype: arithmetic of the matrix products; parameters and updates stay fp32.
    """

    def __init__(self, model: GPT, world: World, config: Config, dtype: torch.dtype) -> None:
        self.model, self.world, self.dtype = model, world, dtype
        self.grad_clip = config.optim.grad_clip
        # DDP averages over ranks the gradients of a loss that each rank sums over its tokens. The
        # update divides them by the number of tokens, which saves a pass over them.
        self.loss_scale = world.size / (config.batch_sequences * config.model.context_length)
        self.optimizer = make_optimizer(model, config.optim, world.device)
        self.spikes = make_spikes(config.optim, world.device)
        self.state = CopiedState(model, self.optimizer, world)
        self.ddp: torch.nn.Module = model
        if world.size > 1:
            self.ddp = DistributedDataParallel(
                model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def warm_up(self, batch: Batch) -> None:
        """Run two passes and drop their gradients.

        DDP rebuilds its buckets after the first, which changes the order of sums. The second needs
        more memory, because gradients exist when it starts. A single process on a CPU needs
        neither.
        """
        if self.world.size > 1 or self.world.device.type != "cpu":
            for _ in range(2):
                self.micro_step(batch, last=True)
        self.optimizer.zero_grad()

    def micro_step(self, batch: Batch, *, last: bool) -> Tensor:
        with ExitStack() as settings:
            # DDP decides in the forward pass whether to reduce, so no_sync must cover it too.
            if isinstance(self.ddp, DistributedDataParallel) and not last:
                settings.enter_context(self.ddp.no_sync())
            if self.world.device.type in FUSED and (self.world.size == 1 or not last):
                settings.enter_context(fused_accumulation())
            with self._autocast():
                loss = self.ddp(batch.ids, batch.targets)
            loss.backward()
        detached: Tensor = loss.detach()
        return detached

    @torch.no_grad()
    def step(
        self,
        lr: float,
        momentum: float | None = None,
        average: float | None = None,
        loss: Tensor | None = None,
    ) -> Tensor:
        set_rates(self.optimizer.param_groups, lr, momentum)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = global_norm(gradients) * self.loss_scale
        spike = self.spikes.skip(loss, norm) if self.spikes and loss is not None else None
        guard_step(self.optimizer, norm, self.grad_clip, self.loss_scale, spike)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.average(average)
        return norm

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        with self._autocast():
            loss: Tensor = self.model(batch.ids, batch.targets)
        return loss

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.state.full()
        yield from spikes_state(self.spikes)

    def begin_average(self) -> None:
        self.state.begin_average()

    def load_optimizer(self, reader: Reader) -> None:
        self.state.load(reader)
        load_spikes(self.spikes, reader)

    def whole_weights(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[object]:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.world.device.type, dtype=self.dtype, enabled=enabled)
