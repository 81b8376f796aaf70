"""The model's layers: PyTorch's parameters, our operations."""

from __future__ import annotations

from torch import Tensor, nn

from gpt_dist import ops


class Linear(nn.Linear):
    """``nn.Linear`` by `ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class GeluLinear(nn.Linear):
    """A linear layer of the tanh GELU of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu_linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """``nn.Embedding`` by `ops.embedding`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.embedding(input, self.weight)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose output is in the dtype of the matrix product that reads it."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class Dropout(nn.Module):
    """Dropout in training, the identity in evaluation."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.rate) if self.training and self.rate else x
