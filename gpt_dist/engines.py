"""One optimizer step behind one small interface: the loop does not know how ranks share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gpt_dist.config import Config
from gpt_dist.data import Batch
from gpt_dist.distributed import World
from gpt_dist.linear import adding_in_place
from gpt_dist.model import GPT
from gpt_dist.muon import MuonWithAdamW
from gpt_dist.optim import global_norm, make_adamw, make_adamw_state

Reader = Callable[[str], Tensor]
"""Name → full tensor on the host, as ``Engine.full_state`` yields them."""


class Engine(Protocol):
    """What the training loop needs; all methods are collective.

    Tensors of the full state are named ``model.<parameter>`` and ``optimizer.<state>.<parameter>``,
    and ``optimizer.step`` (a scalar). They are fp32 and whole, whatever shards them.
    """

    model: GPT

    def warm_up(self, batch: Batch) -> None:
        """Run discarded passes, so that every start of a run reaches the same internal state."""

    def micro_step(self, batch: Batch, *, last: bool) -> Tensor:
        """Add one micro-batch's gradients; ``last`` marks the step's last one.

        Returns:
            The summed loss of this rank's micro-batch in nats, a scalar on the device.
        """
        ...

    def step(self, lr: float) -> Tensor:
        """Clip, update and forget the gradients; skip the update where their norm is not finite.

        Returns:
            The global gradient norm before clipping, a scalar on the device.
        """
        ...

    def evaluate(self, batch: Batch) -> Tensor:
        """Summed loss of a batch without dropout and gradients, a scalar on the device."""
        ...

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of model and optimizer, one whole tensor at a time."""
        ...

    def load_optimizer(self, reader: Reader) -> None:
        """Set every tensor of the optimizer; the model's were set before the engine was made."""
        ...

    def whole_weights(self) -> AbstractContextManager[object]:
        """While entered, ``model`` holds whole parameters on every rank, to be read only."""
        ...


class DDPEngine:
    """Whole copies on every rank, gradients averaged by DistributedDataParallel.

    Args:
        model: on its device; the engine owns it from now on.
        world: the ranks that share a step.
        config: the run's configuration.
        dtype: arithmetic of the matrix products; parameters and updates stay fp32.
    """

    def __init__(self, model: GPT, world: World, config: Config, dtype: torch.dtype) -> None:
        self.model, self.world, self.dtype = model, world, dtype
        self.grad_clip = config.optim.grad_clip
        # Gradients are of each rank's summed loss, averaged over ranks by DDP. Only the update
        # divides them by the tokens: no pass over them just for that.
        self.loss_scale = world.size / (config.batch_sequences * config.model.context_length)
        self.fused = world.device.type in ("cpu", "cuda")
        # With its state before the first pass: what stays must not lie between what comes and goes.
        self.optimizer: torch.optim.Optimizer
        if config.optim.name == "muon":
            self.optimizer = MuonWithAdamW(model, config.optim, fused=self.fused)
        else:
            self.optimizer = adamw = make_adamw(model, config.optim, fused=self.fused)
            make_adamw_state(adamw, fused=self.fused)
        self.ddp: torch.nn.Module = model
        if world.size > 1:
            self.ddp = DistributedDataParallel(
                model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def warm_up(self, batch: Batch) -> None:
        """Two passes: DDP rebuilds its buckets after the first, which changes how sums are ordered.

        A single process has nothing to rebuild.
        """
        if self.world.size > 1:
            for _ in range(2):
                self.micro_step(batch, last=True)
            self.optimizer.zero_grad()

    def micro_step(self, batch: Batch, *, last: bool) -> Tensor:
        with ExitStack() as settings:
            # no_sync must enclose the forward pass too: DDP decides there whether to reduce.
            if isinstance(self.ddp, DistributedDataParallel) and not last:
                settings.enter_context(self.ddp.no_sync())
            if self.world.device.type == "cpu" and (self.world.size == 1 or not last):
                settings.enter_context(adding_in_place(self.model))
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
        if self.fused:
            guard_update(self.optimizer, norm, self.grad_clip, self.loss_scale)
            self.optimizer.step()
        elif norm.isfinite():
            torch._foreach_div_(gradients, clip_divisor(norm, self.grad_clip) / self.loss_scale)
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


def clip_divisor(norm: Tensor, grad_clip: float) -> Tensor:
    """What gradients of a global norm are divided by, so that it becomes at most ``grad_clip``."""
    if not grad_clip:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / grad_clip).clamp(min=1.0)


def guard_update(
    optimizer: torch.optim.Optimizer, norm: Tensor, grad_clip: float, scale: float = 1.0
) -> None:
    """Let the next step of a fused optimizer clip, and skip itself where the norm is not finite.

    The kernel divides by ``grad_scale`` and leaves all alone on ``found_inf``: clipping needs
    no pass over the gradients, and the host need not wait to learn of a NaN.

    Args:
        optimizer: a fused one.
        norm: of the gradients times ``scale``.
        grad_clip: largest norm; 0 = none.
        scale: what the gradients are to be multiplied by.
    """
    optimizer.grad_scale = clip_divisor(norm, grad_clip) / scale  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Arithmetic for ``train.precision`` on a device; ``auto`` is bf16 where hardware has it."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
