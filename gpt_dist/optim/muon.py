"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the
nearest orthogonal matrix. Its update is scaled to the size of AdamW's (Moonlight,
arXiv:2502.16982), so that one learning rate and one schedule serve both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gpt_dist.config.settings import OptimConfig
from gpt_dist.optim.adamw import AdamW, divide_gradients
from gpt_dist.optim.lean import Lean

MOMENTUM = 0.95

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Newton-Schulz' quintic polynomial, from Muon's reference implementation."""

ITERATIONS = 5
"""Of Newton-Schulz."""


@cache
def arithmetic(device: str) -> torch.dtype:
    """dtype of the products: bf16, or fp32 on CPUs that emulate bf16, which is 20 times slower."""
    emulated = device == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return torch.float32 if emulated else torch.bfloat16


def orthogonalize(matrix: Tensor) -> Tensor:
    """Set a matrix's singular values to about 1 (0.7 to 1.2, tiny ones less): Newton-Schulz.

    Every intermediate result is rounded to bf16, whatever dtype computes it, so that a run may
    move between machines.

    Args:
        matrix: (M, N).
    """
    dtype = arithmetic(matrix.device.type)

    def rounded(x: Tensor) -> Tensor:
        return x if x.dtype == torch.bfloat16 else x.bfloat16().to(dtype)

    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = rounded(matrix).to(dtype)
    x = x.T if tall else x
    x = rounded(x / rounded(x.norm()).clamp(min=1e-7))
    for _ in range(ITERATIONS):
        gram = rounded(x @ x.T)
        update = rounded(torch.addmm(gram, gram, gram, beta=b, alpha=c))
        x = rounded(torch.addmm(x, update, x, beta=a))
    return x.T if tall else x


class Muon(Lean):
    """Nesterov momentum, orthogonalized; its update has the RMS of AdamW's.

    Args:
        parameters: matrices.
    """

    def __init__(self, parameters: Iterable[Tensor], config: OptimConfig) -> None:
        super().__init__(parameters, {"lr": config.lr, "weight_decay": config.weight_decay})

    def make_state(self) -> None:
        """Make the momentum of every matrix."""
        for group in self.param_groups:
            for matrix in group["params"]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix]["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonalize(matrix.grad.lerp(momentum, MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


class MuonWithAdamW(Lean):
    """A ``GuardedOptimizer`` made of two: their groups, their state and their steps.

    A guarded step reads ``skip`` on the host. The host waits for the device there, but the dozen
    matrix products that orthogonalise each parameter hide it.

    Args:
        model: whose parameters to optimize; the matrices of ``model.h`` by Muon.
        fused: whether the device has the fused AdamW.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, *, fused: bool) -> None:
        named = dict(model.named_parameters())
        self.matrices = [p for n, p in named.items() if p.dim() == 2 and n.startswith("h.")]
        chosen = {id(p) for p in self.matrices}
        rest = [p for p in named.values() if id(p) not in chosen]
        self.adamw = AdamW(rest, config, fused=fused)
        self.muon = Muon(self.matrices, config)
        super().__init__(list(named.values()), {"lr": config.lr})
        self.param_groups = self.adamw.param_groups + self.muon.param_groups
        self._guard: tuple[Tensor, Tensor] | None = None

    def make_state(self) -> None:
        """Make the state of every parameter now, which PyTorch makes in the first step."""
        self.adamw.make_state()
        self.muon.make_state()
        for owner in (self.adamw, self.muon):
            for parameter, state in owner.state.items():
                self.state[parameter] = state

    def guard(self, divisor: Tensor, skip: Tensor) -> None:
        self._guard = divisor, skip

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        guard, self._guard = self._guard, None
        if guard:
            divisor, skip = guard
            if skip.item():
                return
            self.adamw.guard(divisor, skip)
            divide_gradients(self.matrices, divisor)
        self.adamw.step()
        self.muon.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.adamw.zero_grad(set_to_none)
        self.muon.zero_grad(set_to_none)
