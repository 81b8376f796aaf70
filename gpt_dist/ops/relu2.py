"""Squared ReLU (Primer, arXiv:2109.08668)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gpt_dist.ops import native_training as native
from gpt_dist.ops.activation import Activation
from gpt_dist.ops.registry import register


def relu2(x: Tensor) -> Tensor:
    """``max(x, 0)²``, elementwise."""
    y: Tensor = _relu2(x)
    return y


def _reference(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _cpu(x: Tensor) -> Tensor:
    if native.takes(x):
        y: Tensor = Activation.apply(x, "relu2")  # type: ignore[no-untyped-call]
        return y
    return _reference(x)


_relu2 = register("relu2(Tensor x) -> Tensor", _reference, cpu=_cpu)
