"""Operations that have more than one implementation.

The model calls these functions. Each file has one operation: its reference in PyTorch, its
implementations for some devices, and their registration with PyTorch's dispatcher.
"""

from gpt_dist.ops.attention import attention
from gpt_dist.ops.cross_entropy import linear_cross_entropy, soft_cap
from gpt_dist.ops.dropout import dropout
from gpt_dist.ops.gelu import gelu
from gpt_dist.ops.linear import (
    embedding,
    fused_accumulation,
    gelu_linear,
    linear,
    relu2_linear,
)
from gpt_dist.ops.norm import layer_norm, rms_norm
from gpt_dist.ops.relu2 import relu2
from gpt_dist.ops.residual import add
from gpt_dist.ops.rotary import rotary, rotations

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
    "relu2",
    "relu2_linear",
    "rms_norm",
    "rotary",
    "rotations",
    "soft_cap",
]
