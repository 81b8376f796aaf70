"""The CPU kernels of the training step against float64, no less exact than PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.config.settings import ModelConfig
from gpt_dist.model.gpt import GPT
from gpt_dist.ops import (
    add,
    attention,
    gelu,
    layer_norm,
    native_training,
    norm,
    relu2,
    rms_norm,
    rotary,
    rotations,
)
from gpt_dist.ops.activation import activate, activate_backward
from tests.components import missing

if native_training.kernels() is None:
    missing("no CPU kernels")


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def errors(
    function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and input gradient, in float64."""
    x = x.detach().requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    return y.detach().double(), gradient.double()


def check(own: object, plain: object, exact: object, slack: float = 1.02) -> None:
    for mine, theirs, right in zip(own, plain, exact, strict=True):  # type: ignore[call-overload]
        rounding = 1e-6 * right.numel() ** 0.5  # of fp32, where the exact result is zero
        assert (mine - right).norm() <= slack * (theirs - right).norm() + rounding


def plain_attention(heads: int) -> Callable[[Tensor], Tensor]:
    def run(qkv: Tensor) -> Tensor:
        batch, time, width = qkv.shape
        parts = qkv.view(batch, time, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, time, width // 3)

    return run


@pytest.mark.parametrize("time", [1, 2, 31, 64, 65, 150, 257])
@pytest.mark.parametrize(("heads", "depth"), [(1, 64), (3, 16), (2, 80)])
@pytest.mark.parametrize("size", [0.5, 2.0])
@DTYPES
def test_attention(dtype: torch.dtype, time: int, heads: int, depth: int, size: float) -> None:
    torch.manual_seed(time)
    qkv = (torch.randn(2, time, 3 * heads * depth) * size).to(dtype)
    upstream = torch.randn(2, time, heads * depth).to(dtype).double()
    assert native_training.takes(qkv)
    own = errors(lambda x: attention(x, heads), qkv, upstream)
    plain = errors(plain_attention(heads), qkv, upstream)
    exact = errors(plain_attention(heads), qkv.double(), upstream)
    # A tenth more than PyTorch's where few numbers leave the comparison to chance.
    check(own, plain, exact, slack=1.1)


@DTYPES
def test_attention_of_large_scores(dtype: torch.dtype) -> None:
    """Scores of hundreds leave one key its whole weight, and nothing overflows."""
    torch.manual_seed(0)
    qkv = (torch.randn(1, 40, 3 * 32) * 40).to(dtype)
    upstream = torch.ones(1, 40, 32, dtype=torch.float64)
    own = errors(lambda x: attention(x, 2), qkv, upstream)
    exact = errors(plain_attention(2), qkv.double(), upstream)
    assert all(bool(t.isfinite().all()) for t in own)
    assert (own[0] - exact[0]).norm() < 0.01 * exact[0].norm()


@DTYPES
def test_gelu(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(1003) * 3, torch.tensor([0.0, -0.0, 40.0, -40.0, 1e4, -1e4])])
    x, upstream = x.to(dtype), torch.randn(1009).to(dtype).double()
    own = errors(gelu, x, upstream)
    plain = errors(lambda v: F.gelu(v, approximate="tanh"), x, upstream)
    exact = errors(lambda v: F.gelu(v, approximate="tanh"), x.double(), upstream)
    check(own, plain, exact)


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (63, 16), (130, 40), (300, 768)])
@pytest.mark.parametrize("bias", [True, False])
@DTYPES
def test_layer_norm(dtype: torch.dtype, rows: int, width: int, bias: bool) -> None:
    """Output and all gradients; rows far from zero, where a naive variance would cancel."""
    torch.manual_seed(rows)
    x = torch.randn(rows, width) * 3 + 50
    weight, shift = torch.randn(width), torch.randn(width) if bias else None
    upstream = torch.randn(rows, width).to(dtype)

    def results(inner: torch.dtype, own: bool) -> list[Tensor]:
        inputs = [t.to(inner).requires_grad_() for t in (x, weight, shift) if t is not None]
        if own:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = layer_norm(*inputs, *[None] * (not bias))
            assert y.dtype == dtype
        else:
            y = F.layer_norm(inputs[0], (width,), *inputs[1:], eps=1e-5)
            y = y if inner == torch.float64 else y.to(dtype)
        gradients = torch.autograd.grad(y, inputs, upstream.to(y.dtype))
        return [y.detach().double(), *(g.double() for g in gradients)]

    exact = results(torch.float64, False)
    for mine, right in zip(results(torch.float32, True), exact, strict=True):
        assert mine.shape == right.shape
    own, plain = results(torch.float32, True), results(torch.float32, False)
    check(own[:1], plain[:1], exact[:1])
    for mine, right in zip(own[1:], exact[1:], strict=True):
        assert (mine - right).norm() < 1e-5 * right.norm()


def test_add_keeps_the_residual_stream_in_fp32() -> None:
    x, y = torch.randn(7, 33, requires_grad=True), torch.randn(7, 33).bfloat16().requires_grad_()
    total = add(x, y)
    assert torch.equal(total, x + y.float())
    upstream = torch.randn(7, 33)
    for_x, for_y = torch.autograd.grad(total, [x, y], upstream)
    assert torch.equal(for_x, upstream)
    assert torch.equal(for_y, upstream.bfloat16())


@pytest.mark.parametrize("name", ["gelu", "relu2"])
@DTYPES
def test_an_activation_once_more(dtype: torch.dtype, name: str) -> None:
    """What the backward pass computes again is what the forward pass had, bit for bit."""
    x = (torch.randn(5000) * 4).to(dtype)
    again = torch.empty_like(x)
    activate_backward(name, x, torch.ones_like(x), again)
    assert torch.equal(again, activate(name, x))


@DTYPES
def test_relu2(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(1003) * 3, torch.tensor([0.0, -0.0, 40.0, -40.0])]).to(dtype)
    upstream = torch.randn(1007).to(dtype).double()
    own = errors(relu2, x, upstream)
    plain = errors(lambda v: F.relu(v).square(), x, upstream)
    exact = errors(lambda v: F.relu(v).square(), x.double(), upstream)
    check(own, plain, exact)


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (63, 16), (130, 40)])
@DTYPES
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, width) * 3 + 1
    upstream = torch.randn(rows, width).to(dtype).double()
    own = errors(lambda v: rms_norm(v, 1e-2, dtype), x, upstream)
    plain = errors(lambda v: norm._rms_reference(v, 1e-2, dtype), x, upstream)
    exact = errors(lambda v: F.rms_norm(v, (width,), eps=1e-2), x.double(), upstream)
    check(own, plain, exact, slack=1.1)


@pytest.mark.parametrize(("heads", "shared", "size"), [(1, 1, 6), (4, 2, 10), (6, 1, 64)])
@DTYPES
def test_rotary(dtype: torch.dtype, heads: int, shared: int, size: int) -> None:
    torch.manual_seed(size)
    qkv = (torch.randn(2, 7, (heads + 2 * shared) * size) * 2).to(dtype)
    upstream = torch.randn_like(qkv).double()
    turns = rotations(torch.arange(7) * 100, size, 100.0)

    def turned(x: Tensor) -> Tensor:
        return rotary(x, turns, heads, shared, 1e-2)

    assert native_training.takes(qkv)
    own = errors(turned, qkv, upstream)
    exact = errors(turned, qkv.double(), upstream)  # by the reference, as float64 always is
    with mock.patch.object(native_training, "kernels", return_value=None):
        plain = errors(turned, qkv, upstream)
    # The gradient is that of the rounded output, which is kept.
    check(own, plain, exact, slack=1.5)


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
@DTYPES
def test_whole_model_is_as_exact_without_them(
    dtype: torch.dtype, architecture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of a model against its float64 twin, with the kernels and without."""
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "context_length": 96, "vocab_size": 300}
    config = ModelConfig(architecture=architecture, **sizes)
    ids, targets = torch.randint(300, (2, 4, 96))

    def gradients(weights: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = GPT(config).to(weights)
        bf16 = dtype == torch.bfloat16 and weights == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(ids, targets) / ids.numel()
        loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])  # type: ignore[union-attr]

    exact = gradients(torch.float64)
    fast = gradients(torch.float32)
    monkeypatch.setattr(native_training, "kernels", lambda: None)
    plain = gradients(torch.float32)
    assert not torch.equal(fast, plain)
    # Other roundings of the same size: the ratio was 0.98 to 1.03 over ten seeds.
    assert (fast - exact).norm() < 1.05 * (plain - exact).norm() < 0.02 * exact.norm()


@DTYPES
def test_results_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 70, 3 * 64).to(dtype)
    rows = torch.randn(2048, 768, requires_grad=True)
    weight = torch.randn(768, requires_grad=True)
    threads = torch.get_num_threads()
    upstream, slopes = torch.randn(2, 70, 64), torch.randn(2048, 768).to(dtype)

    def results() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer_norm(rows, weight, None)
        gradients = torch.autograd.grad(y, (rows, weight), slopes)
        return [*errors(lambda x: attention(x, 4), qkv, upstream), y, *gradients]

    outcomes = []
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            outcomes.append(results())
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
