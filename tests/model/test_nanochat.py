"""The architecture nanochat against transformers' NanoChat: logits, loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.config.settings import ModelConfig
from gpt_dist.model.gpt import GPT

TINY = {"n_layer": 2, "n_head": 4, "n_embd": 48, "context_length": 24, "vocab_size": 61}


def make(**settings: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(architecture="nanochat", **{**TINY, **settings})).eval()
    with torch.no_grad():
        for block in model.h:
            for parameter in block.parameters():
                parameter.mul_(4)
        # A standard deviation of 3, so that the cap bends some.
        model.head_weight.mul_(3 / (0.02 * model.config.n_embd**0.5))
    return model


def transformers_model(model: GPT) -> transformers.NanoChatForCausalLM:
    config = model.config
    return transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=model.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.hidden,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context_length,
            tie_word_embeddings=config.tie_embeddings,
            pad_token_id=None,
            attn_implementation="eager",
        )
    ).eval()


def in_their_names(model: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters or gradients of ours by the names of theirs, written for this test."""
    names = {
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    found = {"lm_head.weight": tensors.get("lm_head.weight", tensors["wte.weight"])}
    found["model.embed_tokens.weight"] = tensors["wte.weight"]
    found = {name: tensor[: model.vocab_size] for name, tensor in found.items()}
    config = model.config
    for layer in range(config.n_layer):
        ours, theirs = f"h.{layer}.", f"model.layers.{layer}."
        for name, other in names.items():
            found[f"{theirs}{other}.weight"] = tensors[f"{ours}{name}.weight"]
        qkv = tensors[f"{ours}attn.c_attn.weight"]
        keys = config.kv_heads * config.head_size
        parts = qkv.split([config.n_embd, keys, keys])
        for kind, part in zip("qkv", parts, strict=True):
            found[f"{theirs}self_attn.{kind}_proj.weight"] = part
    return found


def compare(model: GPT, ids: Tensor) -> None:
    other = transformers_model(model)
    other.load_state_dict(in_their_names(model, {n: p.data for n, p in model.named_parameters()}))
    expected = other(ids).logits
    with torch.no_grad():
        actual = model(ids)
    assert float(expected.detach().abs().max()) > 5  # of a cap of 15
    assert float((actual - expected.detach()).abs().max()) < 1e-4
    loss = model(ids[:, :-1], ids[:, 1:].contiguous())
    wanted = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    loss.backward()
    wanted.backward()
    own = in_their_names(model, {n: p.grad for n, p in model.named_parameters()})  # type: ignore[misc]
    for name, parameter in other.named_parameters():
        right = parameter.grad
        assert float((own[name] - right).norm() / right.norm()) < 1e-4, name


@pytest.mark.parametrize(
    "settings", [{}, {"n_kv_head": 2, "mlp_hidden": 40}, {"n_kv_head": 1, "tie_embeddings": True}]
)
def test_logits_loss_and_gradients_equal_transformers(settings: dict[str, Any]) -> None:
    compare(make(**settings), torch.randint(61, (3, 24)))


@pytest.mark.slow(15)
def test_at_the_shape_of_124m() -> None:
    model = make(n_layer=12, n_head=6, n_embd=768, context_length=1024, vocab_size=50257)
    compare(model, torch.randint(50257, (1, 64)))


def test_flops_leave_out_what_is_only_looked_up() -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig(architecture="nanochat", vocab_size=50257))
    blocks = 12 * 12 * 768**2
    assert model.num_parameters() == 2 * 50257 * 768 + blocks
    assert model.flops_per_token() == 6 * (50257 * 768 + blocks) + 12 * 12 * 768 * 1024


def test_there_are_no_vectors_and_fewer_keys_are_smaller() -> None:
    model = make(n_kv_head=1)
    assert all(parameter.dim() == 2 for parameter in model.parameters())
    assert model.shapes["h.0.attn.c_attn.weight"] == (48 + 2 * 12, 48)


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_zeros_to_begin_with(architecture: Any) -> None:
    settings = {**TINY, "tie_embeddings": False, "zero_projections": True, "zero_head": True}
    model = GPT(ModelConfig(architecture=architecture, **settings))
    zero = {name for name, p in model.named_parameters() if p.dim() == 2 and not p.any()}
    assert zero == {
        "lm_head.weight",
        *(f"h.{layer}.{part}.c_proj.weight" for layer in range(2) for part in ("attn", "mlp")),
    }
    ids, targets = torch.randint(61, (2, 3, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):  # the head learns first, then the projections, then what they read
        optimizer.zero_grad()
        model(ids, targets).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any(), name
