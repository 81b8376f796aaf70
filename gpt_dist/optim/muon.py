"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the
nearest orthogonal matrix. Its update is scaled to the size of AdamW's (Moonlight,
arXiv:2502.16982), so that one learning rate and one schedule serve both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt_dist.config.settings import OptimConfig
from gpt_dist.optim.adamw import AdamW, divide_gradients

MOMENTUM = 0.95


class MuonWithAdamW(torch.optim.Optimizer):
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
        self.muon = torch.optim.Muon(
            self.matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        super().__init__(list(named.values()), {"lr": config.lr})
        self.param_groups = self.adamw.param_groups + self.muon.param_groups
        self._guard: tuple[Tensor, Tensor] | None = None

    def make_state(self) -> None:
        """Make the state of every parameter now, which PyTorch makes in the first step."""
        self.adamw.make_state()
        for matrix in self.matrices:
            self.muon.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
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
