"""One optimizer step behind one small interface: the loop does not know how ranks share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from gpt_dist.data.loader import Batch
from gpt_dist.model.gpt import GPT

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
