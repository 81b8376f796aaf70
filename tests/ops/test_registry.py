"""What PyTorch asks of a registered operation, for each of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, library

from gpt_dist import ops
from gpt_dist.ops import registry

TURNS = ops.rotations(torch.arange(5) * 3, 4, 100.0)


def arguments(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    torch.manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    plain = torch.randn(8, 64).to(dtype)
    return {
        "add": (leaf(2, 5, 32, dtype=torch.float32), leaf(2, 5, 32)),
        "attention": (leaf(2, 5, 96), 2, 0.0),
        "dropout": (leaf(3, 7), 0.0),
        "gelu": (leaf(3, 7),),
        "layer_norm": (
            leaf(3, 32, dtype=torch.float32), leaf(32, dtype=torch.float32), None, 1e-5, dtype,
        ),
        "relu2": (leaf(3, 7),),
        "rms_norm": (leaf(3, 32, dtype=torch.float32), 1e-6, dtype),
        "rotary": (leaf(2, 5, 64), ops.rotations(torch.arange(5), 8, 100.0), 4, 2, 1e-6),
        "cross_entropy_": (plain, torch.randint(-1, 60, (8,)), 60, 2.0),
        "decode_attention_": (
            torch.randn(4, 48).to(dtype), torch.randn(2, 4, 2, 5, 8).to(dtype),
            torch.tensor([0, 3, 1, 2]), torch.tensor([1, 1, 0, 1]), 2,
        ),
        "add_norm_": (
            torch.randn(3, 8), torch.randn(3, 8).to(dtype), torch.randn(8), None, 1e-5, False,
            True, dtype,
        ),
        "sample_": (
            torch.randn(3, 64), 60, torch.ones(4, 6), torch.ones(4, 3, dtype=torch.int64) * 5,
            torch.zeros(4, 60), torch.zeros(4, 60, dtype=torch.int32),
            torch.zeros(4, 60, dtype=torch.int8), torch.zeros(4, 60, dtype=torch.int8),
            torch.tensor([0, 2, 4, 0], dtype=torch.int32), torch.ones(4, 4, dtype=torch.int64),
            torch.zeros(4, dtype=torch.int64), torch.zeros(4, 4096),
            torch.zeros(4, dtype=torch.int64),
        ),
        "add_product_": (torch.randn(16, 4), plain[:, :16], plain[:, :4], False),
    }[name]  # fmt: skip


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in sorted(registry.names)),
        # The two that are left out take seconds, and their dtypes are those of `layer_norm`.
        *((name, torch.bfloat16) for name in sorted({*registry.names} - {"attention", "rotary"})),
    ],
)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schema, autograd registration, fake tensors, and eager results equal traced ones."""
    # Traced, a bf16 operation runs its reference, which rounds at other places than the kernel.
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    result = library.opcheck(
        getattr(torch.ops.gpt_dist, name).default, arguments(name, dtype), **close
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (ops.add, [(3, 4), (3, 4)]),
        (lambda qkv: ops.attention(qkv, 2), [(2, 5, 24)]),
        (lambda qkv: ops.attention(qkv, 4, n_kv_head=2), [(2, 5, 32)]),
        (lambda qkv: ops.rotary(qkv, TURNS, 4, 2, 1e-6), [(2, 5, 32)]),
        (lambda x: ops.rms_norm(x, 1e-6), [(3, 8)]),
        (ops.relu2, [(3, 4)]),
        (ops.relu2_linear, [(3, 4), (5, 4), (5,)]),
        (ops.gelu, [(3, 4)]),
        (ops.layer_norm, [(3, 8), (8,), (8,)]),
        (ops.linear, [(3, 4), (5, 4), (5,)]),
        (ops.gelu_linear, [(3, 4), (5, 4), (5,)]),
    ],
    ids=[
        "add",
        "attention",
        "shared keys",
        "rotary",
        "rms_norm",
        "relu2",
        "relu2_linear",
        "gelu",
        "layer_norm",
        "linear",
        "gelu_linear",
    ],
)
def test_gradcheck(function: Any, shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.slow(5)
def test_the_device_chooses_the_implementation() -> None:
    """A CPU tensor takes the CPU's; another device (here: meta) the reference."""
    chosen: list[str] = []

    def reference(x: Tensor) -> Tensor:
        chosen.append("reference")
        return x * 2

    def cpu(x: Tensor) -> Tensor:
        chosen.append("cpu")
        return x * 2

    double = registry.register("test_double(Tensor x) -> Tensor", reference, cpu=cpu)
    for requires_grad in (False, True):
        double(torch.ones(3, requires_grad=requires_grad))
        double(torch.ones(3, device="meta", requires_grad=requires_grad))
    with torch.inference_mode():
        double(torch.ones(3))
    assert chosen == ["cpu", "reference", "cpu", "reference", "cpu"]


@pytest.mark.slow(2)
def test_compiling_traces_through_without_a_graph_break() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def block(x: Tensor, qkv: Tensor, weight: Tensor) -> Tensor:
        x = ops.add(x, ops.attention(ops.linear(x, qkv, None), 2))
        return ops.gelu_linear(ops.layer_norm(x, weight, None), qkv[:32], None)

    x, qkv, weight = torch.randn(2, 6, 32), torch.randn(96, 32), torch.ones(32)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    with ops.fused_accumulation():
        torch.testing.assert_close(compiled(x, qkv, weight), block(x, qkv, weight))
    assert len(graphs) == 1
