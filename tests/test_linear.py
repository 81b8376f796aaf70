"""Gradients that are added in place equal autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt_dist import linear
from gpt_dist import loss as loss_module
from gpt_dist.config import ModelConfig
from gpt_dist.linear import add_in_place
from gpt_dist.model import GPT


def gradients(own: bool, dtype: torch.dtype, *, tie: bool) -> list[Tensor]:
    """Loss and gradients after three micro-batches."""
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=61, tie_embeddings=tie
    )
    model = GPT(config).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if own:
        add_in_place(model)
    torch.manual_seed(1)
    for _ in range(3):
        ids = torch.randint(61, (4, 16))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids, ids.roll(-1, 1))
        loss.backward()
    found = [p.grad for p in model.parameters()]
    return [loss.detach().double(), *(g.double() for g in found if g is not None)]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("chunks", ["one", "several"])
def test_equal_to_autograd(tie: bool, chunks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunks == "several":
        monkeypatch.setattr(linear, "ROWS", 24)
        monkeypatch.setattr(loss_module, "CPU_CHUNK_BYTES", 4 * 128 * 10)
    own = gradients(True, torch.float32, tie=tie)
    plain = gradients(False, torch.float32, tie=tie)
    assert len(own) == len(plain) == 29 + (not tie)
    for mine, theirs in zip(own, plain, strict=True):
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize("tie", [True, False])
def test_no_less_exact_in_bf16(tie: bool) -> None:
    exact = gradients(False, torch.float64, tie=tie)
    own = gradients(True, torch.bfloat16, tie=tie)
    plain = gradients(False, torch.bfloat16, tie=tie)

    def error(found: list[Tensor]) -> float:
        return float(sum((a - b).norm() ** 2 for a, b in zip(found[1:], exact[1:], strict=True)))

    assert error(own) < 1.05 * error(plain)


def test_ignored_without_the_mark() -> None:
    """A plain model's gradients come through autograd, where hooks see them."""
    config = ModelConfig(n_layer=1, n_head=1, n_embd=16, context_length=8, vocab_size=20)
    seen: list[Tensor | None] = []
    for own in (False, True):
        model = GPT(config)
        if own:
            add_in_place(model)
        model.wte.weight.register_hook(seen.append)
        ids = torch.randint(20, (2, 8))
        model(ids, ids).backward()
    assert [None if gradient is None else gradient.shape for gradient in seen] == [(128, 16), None]


def test_evaluation_leaves_gradients_alone() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=16, context_length=8, vocab_size=20))
    add_in_place(model)
    ids = torch.randint(20, (2, 8))
    with torch.no_grad():
        model(ids, ids)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refuses_a_multiple_of_the_loss() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=16, context_length=8, vocab_size=20))
    add_in_place(model)
    ids = torch.randint(20, (2, 8))
    with pytest.raises(ValueError, match="those of the sum"):
        (model(ids, ids) * 0.5).backward()


def test_under_activation_checkpointing() -> None:
    """Blocks that are computed again still add to the model's own gradients."""
    found = []
    for own in (False, True):
        torch.manual_seed(0)
        model = GPT(
            ModelConfig(
                n_layer=2,
                n_head=2,
                n_embd=32,
                context_length=16,
                vocab_size=61,
                activation_checkpointing=True,
            )
        )
        if own:
            add_in_place(model)
        ids = torch.randint(61, (4, 16))
        model(ids, ids.roll(-1, 1)).backward()
        found.append([p.grad for p in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert mine is not None
        assert theirs is not None
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
