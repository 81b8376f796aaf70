"""What the decoder's tests share: small models of every shape, and the choice of a backend."""

from __future__ import annotations

import pytest
import torch

from gpt_dist.config.settings import ModelConfig
from gpt_dist.inference import cpu_kernels as kernels
from gpt_dist.model.gpt import GPT, VOCAB_PARAMETERS
from gpt_dist.ops import build
from tests.components import missing

BACKENDS = ["kernels", "torch"]

SHAPES = {
    "gpt2": {},
    "post-norm": {"norm": "post"},
    "bigram": {"n_layer": 0},
    "untied": {"tie_embeddings": False},
    "no biases": {"bias": False},
    "no qkv bias": {"qkv_bias": False},
    "odd sizes": {"n_embd": 42, "n_head": 3, "mlp_hidden": 50, "vocab_size": 131},
    "wide heads": {"n_embd": 160, "n_head": 2},
    "nanochat": {"architecture": "nanochat", "n_kv_head": 2},
    "nanochat, odd sizes": {
        "architecture": "nanochat",
        "n_embd": 40,
        "mlp_hidden": 50,
        "vocab_size": 131,
    },
}
ARCHITECTURES = pytest.mark.parametrize("shape", ["gpt2", "nanochat"])
"""For what depends on the parts of a model, but not on its sizes."""


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decoders made from here on run on one of `BACKENDS`."""
    monkeypatch.setenv("GPT_DIST_KERNELS", "1" if name == "kernels" else "0")
    if name == "kernels" and kernels.decoder_library() is None:
        missing(f"no CPU kernels: {build.unavailable() or 'they do not load'}")


def small_model(seed: int = 0, **settings: object) -> GPT:
    """A model with random parameters, biases and norms included, large enough to matter."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 96, "vocab_size": 301}
    model = GPT(ModelConfig.model_validate({**shape, **settings})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.15 if parameter.dim() > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
            if name in VOCAB_PARAMETERS:
                parameter[model.vocab_size :] = 0
    return model.requires_grad_(False)
