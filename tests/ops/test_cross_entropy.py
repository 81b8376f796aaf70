"""The fused head and cross-entropy against float64 and unfused PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.data.loader import IGNORE
from gpt_dist.ops import cross_entropy, linear_cross_entropy, native_training

VOCABULARY, PADDED, WIDTH = 203, 256, 48


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, head with zero padding, targets; logits of a few units, as in training."""
    torch.manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(PADDED, WIDTH) * 0.3
    weight[VOCABULARY:] = 0
    return hidden, weight.requires_grad_(), torch.randint(VOCABULARY, (rows,))


def exact(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, cap: float = 0.0
) -> list[Tensor]:
    """Loss and gradients in float64 by the textbook."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = hidden @ weight[:VOCABULARY].t()
    if cap:
        logits = cap * torch.tanh(logits / cap)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))]


@pytest.fixture(params=[1 << 28, 4 * PADDED * 32, 1], ids=["one chunk", "32 rows", "1 row"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_equals_float64(rows: int, ignored: str, cap: float) -> None:
    hidden, weight, targets = inputs(rows)
    if ignored == "all":
        targets[:] = IGNORE
    elif ignored == "some":
        targets[:: 2 if rows > 1 else 1] = IGNORE
    loss = linear_cross_entropy(hidden, weight, targets, VOCABULARY, cap)
    gradients = torch.autograd.grad(loss * 0.01, (hidden, weight))
    assert loss.dtype == torch.float32
    for actual, wanted in zip(
        [loss, *gradients], exact(hidden, weight, targets, 0.01, cap), strict=True
    ):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(gradients[0][targets == IGNORE]) == 0
    assert torch.count_nonzero(gradients[1][VOCABULARY:]) == 0


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_reference_equals_float64(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device without a kernel runs."""
    monkeypatch.setattr(native_training, "kernels", lambda: None)
    hidden, weight, targets = inputs(50)
    loss = linear_cross_entropy(hidden, weight, targets, VOCABULARY, cap)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for actual, wanted in zip(
        [loss.detach(), *gradients], exact(hidden, weight, targets, cap=cap), strict=True
    ):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_exact_as_autocast() -> None:
    """Errors against float64, beside those of linear and cross-entropy under plain autocast."""
    hidden, weight, targets = inputs(2000)
    wanted = exact(hidden, weight, targets, 1 / 2000)

    def errors(loss: Tensor) -> list[float]:
        gradients = torch.autograd.grad(loss / 2000, (hidden, weight))
        return [
            float((actual.double() - right).norm() / right.norm())
            for actual, right in zip([loss.detach(), *gradients], wanted, strict=True)
        ]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = errors(linear_cross_entropy(hidden, weight, targets, VOCABULARY))
        logits = F.linear(hidden, weight)[:, :VOCABULARY]
        plain = errors(F.cross_entropy(logits, targets, reduction="sum"))
    assert own[0] < 1e-3
    for mine, theirs in zip(own, plain, strict=True):
        assert mine <= 1.05 * theirs + 1e-6


def test_without_gradients() -> None:
    hidden, weight, targets = inputs(50)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, VOCABULARY)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), exact(hidden, weight, targets)[0], rtol=1e-6, atol=0)


def test_only_one_side_needs_gradients() -> None:
    hidden, weight, targets = inputs(50)
    frozen = linear_cross_entropy(hidden, weight.detach(), targets, VOCABULARY)
    (gradient,) = torch.autograd.grad(frozen, hidden)
    torch.testing.assert_close(
        gradient.double(), exact(hidden, weight, targets)[1], rtol=1e-4, atol=1e-6
    )


def test_tied_embedding_gets_both_gradients() -> None:
    """The same matrix embeds the inputs and scores the outputs, as in GPT-2."""
    _, weight, targets = inputs(60)
    ids = torch.randint(VOCABULARY, (60,))
    loss = linear_cross_entropy(F.embedding(ids, weight), weight, targets, VOCABULARY)
    (actual,) = torch.autograd.grad(loss, weight)
    double = weight.detach().double().requires_grad_()
    logits = F.embedding(ids, double) @ double[:VOCABULARY].t()
    (wanted,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), double)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)
