"""The engine: hides from the training loop how ranks share an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt_dist.data.loader import Batch
from gpt_dist.model.gpt import GPT
from gpt_dist.optim.adamw import GuardedOptimizer, clip_divisor
from gpt_dist.optim.spikes import Spikes

Reader = Callable[[str], Tensor]
"""Name → full tensor on the host, as ``Engine.full_state`` yields them."""


class Engine(Protocol):
    """What the training loop needs of an engine. All methods are collective.

    The full state consists of the tensors ``model.<parameter>``, ``optimizer.<state>.<parameter>``
    and the scalar ``optimizer.step``. They are fp32 and whole, however they are sharded.
    """

    model: GPT
    spikes: Spikes | None
    """Decides which updates to skip beside those that are not finite."""

    def warm_up(self, batch: Batch) -> None:
        """Run a micro-batch forward and backward and drop the gradients.

        This shows a lack of memory before the first step, and brings every start of a run to the
        same internal state.
        """

    def micro_step(self, batch: Batch, *, last: bool) -> Tensor:
        """Add one micro-batch's gradients; ``last`` says whether it is the step's last.

        Returns:
            The summed loss of this rank's micro-batch in nats, a scalar on the device.
        """
        ...

    def step(
        self,
        lr: float,
        momentum: float | None = None,
        average: float | None = None,
        loss: Tensor | None = None,
    ) -> Tensor:
        """Clip, update and drop the gradients; skip the update if their norm is not finite.

        Args:
            lr: learning rate of the parameters whose kind has none of its own.
            momentum: Muon's; None = as in the step before, at first ``optim.momentum``.
            average: decay of the average of the weights; None = it stays as it is.
            loss: of the step, the same on all ranks; needed where ``spikes`` is set.

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

    def begin_average(self) -> None:
        """Begin an average of the weights, with what they are now; from now on it is state."""
        ...

    def load_optimizer(self, reader: Reader) -> None:
        """Set every tensor of the optimizer; the model was loaded before the engine was made."""
        ...

    def whole_weights(self) -> AbstractContextManager[object]:
        """A context in which ``model`` holds whole parameters on every rank, to be read only."""
        ...


def guard_step(
    optimizer: GuardedOptimizer,
    norm: Tensor,
    grad_clip: float,
    scale: float = 1.0,
    spike: Tensor | None = None,
) -> None:
    """Let the optimizer's next step clip, and skip itself where the norm is not finite.

    Args:
        norm: global norm of the gradients times ``scale``, a scalar on their device.
        grad_clip: largest norm; 0 = no clipping.
        scale: what the gradients are to be multiplied by.
        spike: bool scalar; where it is set, the step skips itself too.
    """
    skip = ~norm.isfinite()
    optimizer.guard(clip_divisor(norm, grad_clip) / scale, skip if spike is None else skip | spike)


def spikes_state(spikes: Spikes | None) -> Iterator[tuple[str, Tensor]]:
    """The part of ``Engine.full_state`` that decides which updates to skip."""
    if spikes:
        yield "optimizer.spikes", spikes.values


def load_spikes(spikes: Spikes | None, reader: Reader) -> None:
    """Set what ``spikes_state`` yields."""
    if spikes:
        spikes.values.copy_(reader("optimizer.spikes"))


def set_rates(groups: list[dict[str, Any]], lr: float, momentum: float | None) -> None:
    """Set what ``Engine.step`` is given in every group of parameters."""
    for group in groups:
        group["lr"] = lr * group["factor"]
        if momentum is not None:
            group["momentum"] = momentum


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """dtype of the matrix products for ``train.precision``; auto = bf16 if the device has it."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
