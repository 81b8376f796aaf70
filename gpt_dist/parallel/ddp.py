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
from gpt_dist.optim.adamw import AdamW, can_fuse, global_norm
from gpt_dist.optim.muon import MuonWithAdamW
from gpt_dist.parallel.engine import Reader, guard_step
from gpt_dist.parallel.world import World


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
        # DDP averages the gradients of each rank's summed loss over ranks. The update itself
        # divides them by the number of tokens, which saves a pass over them.
        self.loss_scale = world.size / (config.batch_sequences * config.model.context_length)
        fused = can_fuse(world.device)
        self.optimizer: AdamW | MuonWithAdamW
        if config.optim.name == "muon":
            self.optimizer = MuonWithAdamW(model, config.optim, fused=fused)
        else:
            self.optimizer = AdamW(list(model.parameters()), config.optim, fused=fused)
        # Before the first pass: tensors that live as long as the run do not fragment the heap.
        self.optimizer.make_state()
        self.ddp: torch.nn.Module = model
        if world.size > 1:
            self.ddp = DistributedDataParallel(
                model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def warm_up(self, batch: Batch) -> None:
        """Passes whose gradients are dropped.

        Two, because DDP rebuilds its buckets after the first, which changes the order of sums,
        and because the second needs more memory: it starts with gradients. Alone on a CPU,
        where nothing can be learned from them, there are none.
        """
        if self.world.size > 1 or self.world.device.type != "cpu":
            for _ in range(2):
                self.micro_step(batch, last=True)
        self.optimizer.zero_grad()

    def micro_step(self, batch: Batch, *, last: bool) -> Tensor:
        with ExitStack() as settings:
            # DDP decides in the forward pass whether to reduce, so no_sync must enclose that too.
            if isinstance(self.ddp, DistributedDataParallel) and not last:
                settings.enter_context(self.ddp.no_sync())
            if self.world.device.type == "cpu" and (self.world.size == 1 or not last):
                settings.enter_context(fused_accumulation())
            with self._autocast():
                loss = self.ddp(batch.ids, batch.targets)
            loss.backward()
        detached: Tensor = loss.detach()
        return detached

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = global_norm(gradients) * self.loss_scale
        guard_step(self.optimizer, norm, self.grad_clip, self.loss_scale)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        with self._autocast():
            loss: Tensor = self.model(batch.ids, batch.targets)
        return loss

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter.detach()
        step = torch.zeros(())
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                if key == "step":
                    step = value
                else:
                    yield f"optimizer.{key}.{name}", value
        yield "optimizer.step", step

    @torch.no_grad()
    def load_optimizer(self, reader: Reader) -> None:
        step = reader("optimizer.step")
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                value.copy_(step if key == "step" else reader(f"optimizer.{key}.{name}"))

    def whole_weights(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[object]:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.world.device.type, dtype=self.dtype, enabled=enabled)
