"""The model's layers: PyTorch's parameters, our operations.

`NORMS` and `ACTIVATIONS` have a layer for each part that an architecture can be made of.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt_dist import ops
from gpt_dist.config.settings import ModelConfig


class Linear(nn.Linear):
    """``nn.Linear`` by `ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class GeluLinear(nn.Linear):
    """A linear layer of the tanh GELU of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu_linear(input, self.weight, self.bias)


class Relu2Linear(nn.Linear):
    """A linear layer of the squared ReLU of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.relu2_linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """``nn.Embedding`` by `ops.embedding`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.embedding(input, self.weight)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose output is in the dtype of the matrix product that reads it."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """`ops.rms_norm`; ``width`` and ``bias`` are for the signature only, it has no weights."""

    def __init__(self, width: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        return ops.rms_norm(input, self.eps)


class WideRMSNorm(RMSNorm):
    """RMSNorm whose output is fp32, or float64 for such an input."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        return ops.rms_norm(input, self.eps, wide)


class Rotary(nn.Module):
    """Gives queries and keys their positions, 0 to T - 1, and normalises them (`ops.rotary`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.size = (config.n_head, config.kv_heads), config.head_size
        self.base, self.eps = config.parts.rotary_base, config.parts.eps

    def forward(self, qkv: Tensor) -> Tensor:
        positions = torch.arange(qkv.shape[-2], device=qkv.device)
        return ops.rotary(
            qkv, ops.rotations(positions, self.size, self.base), *self.heads, self.eps
        )


class Dropout(nn.Module):
    """Dropout in training, the identity in evaluation."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.rate) if self.training and self.rate else x


NORMS = {"layer": (LayerNorm, nn.LayerNorm), "rms": (RMSNorm, WideRMSNorm)}
"""Norm → for a branch, whose matrix products read it; and for the residual stream, in fp32."""

ACTIVATIONS = {"gelu": GeluLinear, "relu2": Relu2Linear}
"""Activation → a linear layer that begins with it."""


def norm(config: ModelConfig, *, stream: bool = False) -> nn.Module:
    """A norm of the residual stream for a branch; with ``stream`` for the stream itself."""
    kind = NORMS[config.parts.norm][stream]
    layer: nn.Module = kind(config.n_embd, eps=config.parts.eps, bias=config.bias)
    return layer
