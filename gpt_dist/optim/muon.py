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
from gpt_dist.optim.adamw import make_adamw_state

MOMENTUM = 0.95


class MuonWithAdamW(torch.optim.Optimizer):
    """Presents two optimizers as one: their groups, their state and their step.

    Clips and skips as PyTorch's fused AdamW does: ``grad_scale`` divides the gradients, and where
    ``found_inf`` is set nothing changes. Reading ``found_inf`` makes the host wait for the device,
    which the orthogonalisation's dozen of matrix products a parameter hides.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, model: nn.Module, config: OptimConfig, *, fused: bool) -> None:
        named = dict(model.named_parameters())
        self.matrices = [p for n, p in named.items() if p.dim() == 2 and n.startswith("h.")]
        chosen = {id(p) for p in self.matrices}
        rest = [p for p in named.values() if id(p) not in chosen]
        decay = [p for p in rest if p.dim() >= 2]
        plain = [p for p in rest if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=1e-8,
            fused=fused,
        )
        self.muon = torch.optim.Muon(
            self.matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        super().__init__(list(named.values()), {"lr": config.lr})
        self.param_groups = self.adamw.param_groups + self.muon.param_groups

        make_adamw_state(self.adamw, fused=fused)
        for matrix in self.matrices:
            self.muon.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        for owner, parameters in ((self.adamw, rest), (self.muon, self.matrices)):
            for parameter in parameters:
                self.state[parameter] = owner.state[parameter]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.found_inf.item():
            return
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        gradients = [p.grad for p in self.matrices if p.grad is not None]
        torch._foreach_div_(gradients, self.grad_scale)
        self.muon.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.adamw.zero_grad(set_to_none)
        self.muon.zero_grad(set_to_none)
