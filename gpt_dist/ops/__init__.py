"""Operations that have more than one implementation.

The model calls these functions. Each file has one operation: its reference in PyTorch, its
implementations for some devices, and their registration with PyTorch's dispatcher.
"""

from gpt_dist.ops.attention import attention
from gpt_dist.ops.cross_entropy import linear_cross_entropy
from gpt_dist.ops.dropout import dropout
from gpt_dist.ops.gelu import gelu
from gpt_dist.ops.linear import embedding, fused_accumulation, gelu_linear, linear
from gpt_dist.ops.norm import layer_norm
from gpt_dist.ops.residual import add

__all__ = [
    "add",
    "attention",
    "dropout",
    "embedding",
    "fused_accumulation",
    "gelu",
    "gelu_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
]
