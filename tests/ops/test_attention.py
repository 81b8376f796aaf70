"""Attention and dropout against float64 formulas that see the same dropped elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt_dist import ops
from gpt_dist.model.layers import Dropout
from gpt_dist.ops.attention import blocked_attention as attention


def reference(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, keep: float) -> Tensor:
    """Softmax attention written out: whole matrices, the kept weights scaled."""
    time = query.shape[2]
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) * kept / keep) @ value


def kept_weights(query: Tensor, key: Tensor, dropout: float, seed: int) -> Tensor:
    """Which weights a seed keeps: with the identity as values the output is the weights."""
    batch, heads, time, depth = query.shape
    assert time == depth
    identity = torch.eye(time, dtype=query.dtype).expand(batch, heads, time, time)
    torch.manual_seed(seed)
    return attention(query, key, identity, dropout) != 0


# 150 keys: more than one block of queries, and the last one shorter.
@pytest.mark.slow(2)
@pytest.mark.parametrize(("batch", "heads", "time"), [(2, 3, 16), (1, 2, 150), (90, 1, 150)])
def test_attention_with_dropout_equals_float64(batch: int, heads: int, time: int) -> None:
    torch.manual_seed(0)
    shape = (batch, heads, time, time)
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    kept = kept_weights(query.detach(), key.detach(), 0.2, seed=5)
    keep = 1 - 51 / 256
    causal = torch.ones(time, time).tril().expand(shape)
    assert kept.sum().item() / causal.sum().item() == pytest.approx(keep, abs=0.05)

    torch.manual_seed(5)
    mixed = attention(query, key, value, 0.2)
    expected = reference(query, key, value, kept, keep)
    torch.testing.assert_close(mixed, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(shape, dtype=torch.float64)
    actual_grads = torch.autograd.grad((mixed * weights).sum(), (query, key, value))
    expected_grads = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


def test_attention_in_bf16_is_as_exact_as_pytorchs_own() -> None:
    """Error of output and gradients against float64, beside the unfused path under autocast."""
    torch.manual_seed(0)
    exact = [torch.randn(4, 4, 150, 150, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    half = [t.detach().bfloat16().requires_grad_() for t in exact]
    rounded = [t.detach().double().requires_grad_() for t in half]
    kept = kept_weights(half[0].detach(), half[1].detach(), 0.2, seed=3)
    upstream = torch.randn(4, 4, 150, 150, dtype=torch.float64)

    def errors(mixed: Tensor, inputs: list[Tensor]) -> list[float]:
        grads = torch.autograd.grad((mixed * upstream.to(mixed.dtype)).sum(), inputs)
        return [
            float(((a.double() - b).norm() / b.norm()).detach())
            for a, b in zip((mixed, *grads), (expected, *wanted), strict=True)
        ]

    keep = 1 - 51 / 256
    expected = reference(*rounded, kept, keep)
    wanted = torch.autograd.grad((expected * upstream).sum(), rounded)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = errors(attention(*half, 0.2), half)
    plain = errors(reference(*half, kept, keep), half)
    for mine, theirs in zip(own, plain, strict=True):
        assert mine < 0.02
        assert mine < 1.1 * theirs


def test_same_seed_same_dropout() -> None:
    query, key, value = torch.randn(3, 2, 2, 40, 8)
    dropout = Dropout(0.3)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return attention(query, key, value, 0.3), dropout(value)

    for first, again, other in zip(run(1), run(1), run(2), strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_heads_are_split_and_joined_as_the_written_out_formula(dropout: float) -> None:
    torch.manual_seed(0)
    batch, time, heads, depth = 2, 20, 3, 20
    qkv = torch.randn(batch, time, 3 * heads * depth, dtype=torch.float64)
    query, key, value = (
        part.view(batch, time, heads, depth).transpose(1, 2)
        for part in qkv.split(heads * depth, dim=-1)
    )
    kept, keep = torch.ones(()), 1.0
    if dropout:
        kept, keep = kept_weights(query, key, dropout, seed=9), 1 - 51 / 256
    expected = reference(query, key, value, kept, keep).transpose(1, 2).flatten(2)
    torch.manual_seed(9)
    torch.testing.assert_close(ops.attention(qkv, heads, dropout), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(dtype: torch.dtype, rate: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 400, dtype=dtype, requires_grad=True)
    dropout = Dropout(rate)
    y = dropout(x)
    keep = 1 - round(256 * rate) / 256
    kept = y != 0
    share = float(kept.double().mean())
    # Five standard deviations of the mean of 200,000 draws.
    assert abs(share - keep) < 5 * (keep * (1 - keep) / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept], (x / keep)[kept])
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * upstream).sum(), x)
    torch.testing.assert_close(gradient, torch.where(kept, upstream / keep, 0))
    assert torch.equal(dropout.eval()(x), x)


def test_dropped_elements_are_independent() -> None:
    """Neighbours along a row are dropped together as often as chance has it."""
    torch.manual_seed(0)
    kept = Dropout(0.5)(torch.ones(1 << 20)) != 0
    for distance in (1, 2, 7, 8, 64):
        together = (kept[distance:] & kept[:-distance]).double().mean()
        assert abs(float(together) - 0.25) < 0.003
