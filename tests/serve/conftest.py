"""Tiny models and their decoders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gpt_dist.config import ModelConfig
from gpt_dist.decoding import Decoder
from gpt_dist.model import GPT

CONTEXT = 160
VOCABULARY = 300


def tiny_model(seed: int = 0, vocab_size: int = VOCABULARY, context: int = CONTEXT) -> GPT:
    """A random model whose logits are far enough apart to be told from each other."""
    torch.manual_seed(seed)
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, context_length=context, vocab_size=vocab_size
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.wte.weight[vocab_size:] = 0
    return model


@pytest.fixture(scope="session")
def model() -> GPT:
    return tiny_model()


@pytest.fixture
def make_decoder(model: GPT) -> Callable[..., Decoder]:
    def make(slots: int = 4, **options: object) -> Decoder:
        return Decoder(model, max_slots=slots, dtype="fp32", **options)  # type: ignore[arg-type]

    return make
