"""One optimizer step behind one small interface: the loop does not know how ranks share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from gpt_dist.data.loader import Batch
from gpt_dist.model.gpt import GPT
from gpt_dist.optim.adamw import GuardedOptimizer, clip_divisor

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


def guard_step(
    optimizer: GuardedOptimizer, norm: Tensor, grad_clip: float, scale: float = 1.0
) -> None:
    """Let the optimizer's next step clip, and skip itself where the norm is not finite.

    Args:
        norm: global norm of the gradients times ``scale``, a scalar on their device.
        grad_clip: largest norm; 0 = no clipping.
        scale: what the gradients are to be multiplied by.
    """
    optimizer.guard(clip_divisor(norm, grad_clip) / scale, ~norm.isfinite())


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Arithmetic for ``train.precision`` on a device; ``auto`` is bf16 where hardware has it."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
