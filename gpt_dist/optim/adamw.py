"""Parameter groups, AdamW and the global gradient norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt_dist.config.settings import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and embeddings decay; biases and layer norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_adamw(model: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over the model's two groups."""
    groups = [group for group in parameter_groups(model, config.weight_decay) if group["params"]]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=fused
    )


def make_adamw_state(optimizer: torch.optim.AdamW, *, fused: bool) -> None:
    """Make AdamW's state of every parameter now, which it would make at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


@torch.no_grad()
def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all tensors together, a scalar on their device."""
    if not tensors or tensors[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(tensors, foreach=True)
    # PyTorch's sum over 38M numbers at once was off by a thousandth; over a row it is not.
    rows = [torch.linalg.vector_norm(t, dim=-1).flatten() for t in tensors]
    norm: Tensor = torch.linalg.vector_norm(torch.cat(rows))
    return norm
