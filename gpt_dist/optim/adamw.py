"""Parameter groups, AdamW and the global gradient norm."""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt_dist.config.settings import OptimConfig
from gpt_dist.optim.lean import Lean

Guard = tuple[Tensor, Tensor]
"""What gradients are divided by, and whether the step is skipped: scalars."""


class GuardedOptimizer(Protocol):
    """An optimizer that divides gradients by a number before a step, and can skip the step."""

    param_groups: list[dict[str, Any]]

    def guard(self, divisor: Tensor, skip: Tensor) -> None:
        """Prepare the next step.

        Args:
            divisor: scalar that the gradients are divided by.
            skip: bool scalar; where it is set, the step changes nothing.
        """

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


def kind_of(name: str, parameter: Tensor) -> str:
    """Which field of ``optim.rates`` a parameter of the model belongs to."""
    if parameter.dim() < 2:
        return "vectors"
    if name.startswith("h."):
        return "matrices"
    return "head" if name.startswith("lm_head") else "embedding"


def options_of(kind: str, config: OptimConfig) -> dict[str, Any]:
    """How a kind of parameters is updated, as options of a group."""
    own = getattr(config.rates, kind)
    decay = 0.0 if kind == "vectors" else config.weight_decay
    beta1, beta2 = own.beta1, own.beta2
    return {
        "factor": 1.0 if own.lr is None else own.lr / config.lr,
        "betas": (
            config.beta1 if beta1 is None else beta1,
            config.beta2 if beta2 is None else beta2,
        ),
        "weight_decay": decay if own.weight_decay is None else own.weight_decay,
        "muon": config.name == "muon" and kind == "matrices",
    }


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters by how they are updated.

    Beside PyTorch's options a group has ``factor``, its learning rate beside ``optim.lr``;
    ``muon``, whether Muon updates it; and Muon's ``momentum``.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        options = options_of(kind_of(name, parameter), config)
        key = tuple(options.values())
        groups.setdefault(key, {"params": [], "momentum": config.momentum, **options})
        groups[key]["params"].append(parameter)
    return list(groups.values())


class AdamW(Lean, torch.optim.AdamW):
    """AdamW (arXiv:1711.05101) as a ``GuardedOptimizer``.

    The fused kernel divides by ``grad_scale`` and does nothing where ``found_inf`` is set. So
    clipping needs no pass over the gradients, and the host does not wait to hear of a NaN.
    Without it a guarded step reads ``skip`` on the host and divides the gradients first.

    Args:
        model: whose parameters to optimize.
        fused: whether the device of the parameters has the fused kernel.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, *, fused: bool) -> None:
        super().__init__(
            parameter_groups(model, config),
            lr=config.lr,
            eps=config.eps,
            fused=fused,
        )
        self.fused = fused
        self._guard: Guard | None = None
        self.ask: Callable[[], Guard] | None = None
        """Asked by a step for what ``guard`` is otherwise told."""

    def guard(self, divisor: Tensor, skip: Tensor) -> None:
        self._guard = divisor, skip

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        guard, self._guard = self.next_guard(), None
        self.grad_scale = self.found_inf = None
        if guard and self.fused:
            self.grad_scale, self.found_inf = guard[0], guard[1].float()
        elif guard:
            if guard[1].item():
                return
            divide_gradients([p for group in self.param_groups for p in group["params"]], guard[0])
        with torch.no_grad():
            unwrap(torch.optim.AdamW.step)(self, closure)  # see `Lean`

    def next_guard(self) -> Guard | None:
        """What the next step is guarded by."""
        return self._guard or (self.ask() if self.ask else None)

    def make_state(self, tensors: list[Tensor]) -> None:
        """Make the moments of some tensors now, which PyTorch makes in the first step."""
        for tensor in tensors:
            self.state[tensor] = {
                "step": torch.zeros((), device=tensor.device if self.fused else "cpu"),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }


@torch.no_grad()
def divide_gradients(parameters: list[nn.Parameter], divisor: Tensor) -> None:
    """Divide the gradients of the parameters that have one, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, divisor)


def can_fuse(device: torch.device) -> bool:
    """Whether PyTorch's fused AdamW, which can skip a step by itself, exists for a device."""
    return device.type in ("cpu", "cuda")


def clip_divisor(norm: Tensor, grad_clip: float) -> Tensor:
    """What gradients are divided by so that their global norm is at most ``grad_clip`` (0: any)."""
    if not grad_clip:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / grad_clip).clamp(min=1.0)


@torch.no_grad()
def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all tensors together, a scalar on their device."""
    if not tensors or tensors[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(tensors, foreach=True)
    # PyTorch's sum of 38M squares in fp32 was off by a thousandth; sums of rows are exact enough.
    rows = [torch.linalg.vector_norm(t, dim=-1).flatten() for t in tensors]
    norm: Tensor = torch.linalg.vector_norm(torch.cat(rows))
    return norm
