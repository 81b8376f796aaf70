"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the
nearest orthogonal matrix. Its update is scaled to the size of AdamW's (Moonlight,
arXiv:2502.16982), so that one learning rate and one schedule serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt_dist.config.settings import OptimConfig
from gpt_dist.optim.adamw import AdamW, Guard, kind_of
from gpt_dist.optim.blocks import Fragment, Share, blocks_of, scale
from gpt_dist.optim.newton_schulz import orthogonalize


class Muon(AdamW):
    """A ``GuardedOptimizer`` whose groups with ``muon`` set are matrices for Muon.

    Each block of a matrix is orthogonalised once in a step, by the rank that owns it. So before
    the first step every tensor in those groups needs a ``Share`` (``share_out``).

    Args:
        model: whose parameters to optimize; the matrices of ``model.h`` by Muon.
        fused: whether the device has the fused AdamW.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, *, fused: bool) -> None:
        super().__init__(model, config, fused=fused)
        self.config = config
        self.matrices = {
            name: parameter
            for name, parameter in model.named_parameters()
            if kind_of(name, parameter) == "matrices"
        }
        shapes = {name: tuple(matrix.shape) for name, matrix in self.matrices.items()}
        self.blocks = blocks_of(shapes, split_qkv=config.split_qkv)
        fp32 = config.newton_schulz_precision == "fp32"
        self.dtype = torch.float32 if fp32 else torch.bfloat16
        """Of what is orthogonalised and of the result."""
        self.shares: dict[Tensor, Share] = {}
        """First of some tensors that are stepped together → how their blocks are shared."""

    def share_out(
        self, tensors: list[Tensor], share: Share, kept: Sequence[tuple[int, ...]]
    ) -> None:
        """Say which rank does what for tensors that are stepped together; make their momentum.

        Args:
            tensors: whole matrices, or a flat partition of them.
            share: of their blocks.
            kept: shape of the momentum of each tensor on this rank.
        """
        self.shares[tensors[0]] = share
        for tensor, shape in zip(tensors, kept, strict=True):
            momentum = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            self.state[tensor] = {"momentum_buffer": momentum}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        guard = self._guard = self.next_guard()  # asked once, for AdamW's part too
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"] and group["params"]:
                self._step_matrices(group, guard)

    def _step_matrices(self, group: dict[str, Any], guard: Guard | None) -> None:
        tensors, lr = group["params"], group["lr"]
        share = self.shares[tensors[0]]
        skip = guard[1] if guard else None
        config, sent = self.config, []
        for shape in share.shapes:
            directions = [self._direction(f, group, guard) for f in share.sources[shape]]
            mine = share.to_owners(shape, directions)
            done = orthogonalize(
                mine, config.newton_schulz_coefficients, config.newton_schulz_steps
            )
            sent.append((shape, share.to_holders(shape, [x.to(self.dtype) for x in done])))
        decay: float | Tensor = 1 - lr * group["weight_decay"]
        if skip is not None:
            decay = torch.where(skip, 1.0, decay)
        for tensor in tensors:
            tensor.mul_(decay)
        for shape, receive in sent:
            for fragment, update in zip(share.targets[shape], receive(), strict=True):
                weights = part(tensors[fragment.tensor], fragment.at, fragment.size)
                change = update.to(weights.device)
                if skip is not None:
                    change = torch.where(skip, 0.0, change)
                weights.add_(change, alpha=-lr * scale(shape))

    def _direction(self, fragment: Fragment, group: dict[str, Any], guard: Guard | None) -> Tensor:
        """Advance the momentum of a fragment; returns what is to be orthogonalised, flat."""
        tensor, beta = group["params"][fragment.tensor], group["momentum"]
        gradient = part(tensor.grad, fragment.at, fragment.size)
        momentum = part(self.state[tensor]["momentum_buffer"], fragment.kept, fragment.size)
        if guard is None:
            momentum.lerp_(gradient, 1 - beta)
        else:
            divisor, skip = guard
            gradient.div_(divisor)
            # Where the step is skipped, without asking the device: the host need not wait for it.
            momentum.copy_(torch.where(skip, momentum, momentum.lerp(gradient, 1 - beta)))
        direction = gradient.lerp(momentum, beta) if self.config.nesterov else momentum
        return direction.to(self.dtype)


def part(tensor: Tensor, first: int, size: int) -> Tensor:
    """Consecutive elements of a tensor, as a flat view."""
    return tensor.view(-1)[first : first + size]
