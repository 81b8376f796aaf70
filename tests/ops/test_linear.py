"""Fused gradient accumulation gives autograd's gradients."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from gpt_dist.config.settings import ModelConfig
from gpt_dist.model.gpt import GPT
from gpt_dist.model.layers import GeluLinear
from gpt_dist.ops import cross_entropy, fused_accumulation, gelu, native_training
from gpt_dist.ops import linear as apply_linear
from tests.components import missing

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 16, "vocab_size": 61}


def gradients(own: bool, dtype: torch.dtype = torch.float32, **settings: object) -> list[Tensor]:
    """Loss and gradients after three micro-batches."""
    torch.manual_seed(0)
    model = GPT(ModelConfig.model_validate(TINY | settings))
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    torch.manual_seed(1)
    for _ in range(3):
        ids = torch.randint(61, (4, 16))
        with fused_accumulation(own):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(ids, ids.roll(-1, 1))
            loss.backward()
    found = [p.grad for p in model.parameters()]
    return [loss.detach().double(), *(g.double() for g in found if g is not None)]


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": False}, {"norm": "post"}])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunks", ["one", "several"])
def test_equal_to_autograd(
    settings: dict[str, object], recompute: bool, chunks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunks == "several":
        monkeypatch.setattr(import_module("gpt_dist.ops.linear"), "ROWS", 24)
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 128 * 10)
        monkeypatch.setattr(cross_entropy, "PIECE", 48)
    settings = settings | {"activation_checkpointing": recompute}
    own, plain = gradients(True, **settings), gradients(False, **settings)
    assert len(own) == len(plain) >= 27
    for mine, theirs in zip(own, plain, strict=True):
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize("tie", [True, False])
def test_no_less_exact_in_bf16(tie: bool) -> None:
    exact = gradients(False, torch.float64, tie_embeddings=tie)
    own = gradients(True, torch.bfloat16, tie_embeddings=tie)
    plain = gradients(False, torch.bfloat16, tie_embeddings=tie)

    def error(found: list[Tensor]) -> float:
        return float(sum((a - b).norm() ** 2 for a, b in zip(found[1:], exact[1:], strict=True)))

    assert error(own) < 1.05 * error(plain)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_recomputed_gelu_changes_no_bit(layout: str) -> None:
    """And is not kept: the two passes differ in what autograd saves."""
    if native_training.kernels() is None:
        missing("no CPU kernels")
    found, kept = [], []
    for recompute in (True, False):
        torch.manual_seed(0)
        layer, x = GeluLinear(48, 32), torch.randn(4, 9, 48).bfloat16()
        if layout == "transposed":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        x.requires_grad_()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with fused_accumulation(), torch.autocast("cpu", torch.bfloat16), saving:
            y = layer(x) if recompute else apply_linear(gelu(x), layer.weight, layer.bias)
        kept.append(sum(sizes))
        y.backward(torch.randn_like(y))
        assert layer.bias is not None
        found.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    assert kept == [x.numel(), 2 * x.numel()]
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_micro_batches_of_both_kinds_add_up() -> None:
    """As under DDP: all but the last are fused, the last goes through autograd and its hooks."""
    seen: list[Tensor | None] = []
    found = []
    for own in (False, True):
        torch.manual_seed(0)
        model = GPT(ModelConfig.model_validate(TINY))
        model.wte.weight.register_hook(seen.append)
        ids = torch.randint(61, (4, 16))
        with fused_accumulation(own):
            model(ids, ids.roll(-1, 1)).backward()
        model(ids, ids.roll(1, 1)).backward()
        found.append([p.grad for p in model.parameters()])
    kinds = [None if gradient is None else tuple(gradient.shape) for gradient in seen]
    assert kinds == [(128, 32), (128, 32), None, (128, 32)]
    for mine, theirs in zip(*found, strict=True):
        assert mine is not None
        assert theirs is not None
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_evaluation_leaves_gradients_alone() -> None:
    model = GPT(ModelConfig.model_validate(TINY))
    ids = torch.randint(61, (2, 8))
    with fused_accumulation(), torch.no_grad():
        model(ids, ids)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refuses_a_multiple_of_the_loss() -> None:
    model = GPT(ModelConfig.model_validate(TINY))
    ids = torch.randint(61, (2, 8))
    with fused_accumulation(), pytest.raises(ValueError, match="scale the gradients"):
        (model(ids, ids) * 0.5).backward()
