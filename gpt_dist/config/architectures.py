"""What each ``model.architecture`` is made of, as data.

The model, the decoders, the exports and the checks of a configuration read it here. What they do
with a part, say a rotary position, depends on the part and not on the architecture's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Name = Literal["gpt2", "nanochat"]


@dataclass(frozen=True)
class Architecture:
    """What a model computes, apart from its sizes."""

    norm: Literal["layer", "rms"]
    """Layer norm with weights, or RMSNorm (arXiv:1910.07467) without."""
    eps: float
    """Added to a norm's variance or mean square."""
    norm_embedding: bool
    """Whether the token embedding is normalised too."""
    positions: Literal["learned", "rotary"]
    """A learned vector for each position, or queries and keys that are rotated by their position
    (RoPE, arXiv:2104.09864) and then normalised by RMSNorm."""
    rotary_base: float
    """The slowest of the rotations takes about 2π times so many positions."""
    activation: Literal["gelu", "relu2"]
    """Inside the MLP: tanh GELU, or squared ReLU (arXiv:2109.08668)."""
    soft_cap: float
    """Logits z become c tanh(z / c), so that none exceeds c; 0 = they stay as they are."""
    shares_keys: bool
    """Whether several heads of queries may share one of keys and values (arXiv:2305.13245)."""
    bigram: bool
    """Whether it may have no layers."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the model whose default differs from that of gpt2."""
    fixed: tuple[str, ...] = ()
    """Those among them that may not be set to another value."""


ARCHITECTURES: dict[Name, Architecture] = {
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    "gpt2": Architecture(
        norm="layer",
        eps=1e-5,
        norm_embedding=False,
        positions="learned",
        rotary_base=0.0,
        activation="gelu",
        soft_cap=0.0,
        shares_keys=False,
        bigram=True,
    ),
    # karpathy/nanochat, as transformers' NanoChatForCausalLM computes it.
    "nanochat": Architecture(
        norm="rms",
        eps=1e-6,
        norm_embedding=True,
        positions="rotary",
        rotary_base=10000.0,
        activation="relu2",
        soft_cap=15.0,
        shares_keys=True,
        bigram=False,
        defaults={"bias": False, "qkv_bias": None, "norm": "pre", "tie_embeddings": False},
        fixed=("bias", "qkv_bias", "norm"),
    ),
}
