"""GELU in its tanh approximation (arXiv:1606.08415), as GPT-2 uses it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops import native_training as native
from gpt_dist.ops.activation import Activation
from gpt_dist.ops.registry import register


def gelu(x: Tensor) -> Tensor:
    """tanh GELU, elementwise."""
    y: Tensor = _gelu(x)
    return y


def _reference(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _cpu(x: Tensor) -> Tensor:
    if native.takes(x):
        y: Tensor = Activation.apply(x, "gelu")  # type: ignore[no-untyped-call]
        return y
    return _reference(x)


_gelu = register("gelu(Tensor x) -> Tensor", _reference, cpu=_cpu)
