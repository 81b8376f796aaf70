"""Linear layers, GELU and embeddings; those with weights add to their gradients in place.

Autograd computes each micro-batch's gradient of a matrix as a new fp32 tensor and then adds it to
the sum. Where nothing else waits for that tensor (one process, or a micro-batch that is not the
last of a step), the product can be added to the sum directly: less memory, and fewer passes over
it. Outside of ``adding_in_place`` autograd does as always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_dist.ops import training_kernels

ROWS = 8192
"""Most rows of a matrix whose gradient is computed at once; bounds the memory of the product."""


@contextmanager
def adding_in_place(model: nn.Module) -> Iterator[None]:
    """Within, passes add the gradients of the model's matrices without autograd's accumulation.

    Not for passes whose gradients a reducer waits for. The output head's are added while its loss
    is computed, so only the loss itself can be differentiated, not a multiple.
    """
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.in_place = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.in_place = False  # type: ignore[attr-defined]


def in_place(parameter: Tensor) -> bool:
    """Whether this pass is within ``adding_in_place`` for the model of this parameter."""
    return getattr(parameter, "in_place", False) and not torch.compiler.is_compiling()


@torch.no_grad()
def add_product(parameter: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left.T @ right`` to a parameter's gradient.

    Args:
        parameter: (M, N), fp32.
        left: (K, M); ``right``: (K, N).
    """
    fresh = parameter.grad is None
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    total = parameter.grad
    for start in range(0, len(parameter), ROWS):
        rows = slice(start, start + ROWS)
        if left.dtype == total.dtype:
            total[rows].addmm_(left[:, rows].t(), right, beta=0 if fresh else 1)
            continue
        product = left[:, rows].t() @ right
        if fresh:
            total[rows] = product
        elif training_kernels.usable(product) and total.is_contiguous():
            training_kernels.run("add", total[rows], product, total[rows], product.numel())
        else:
            total[rows] += product


class Linear(nn.Linear):
    """``nn.Linear``; with ``in_place`` its matrix is cast twice, not kept in two dtypes."""

    def forward(self, input: Tensor) -> Tensor:
        if in_place(self.weight) and torch.is_grad_enabled():
            return self._in_place(input, False)
        return F.linear(input, self.weight, self.bias)

    def _in_place(self, input: Tensor, of_gelu: bool) -> Tensor:
        dtype = input.dtype
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
        y: Tensor = _Linear.apply(input.to(dtype), self.weight, self.bias, of_gelu)  # type: ignore[no-untyped-call]
        return y


class GeluLinear(Linear):
    """A linear layer of the tanh GELU of its input.

    With ``in_place``, the GELU's output is computed again where its gradient is, not kept.
    """

    def forward(self, input: Tensor) -> Tensor:
        if in_place(self.weight) and torch.is_grad_enabled() and training_kernels.usable(input):
            return self._in_place(input, True)
        return super().forward(gelu(input))


def gelu(x: Tensor) -> Tensor:
    """tanh GELU (arXiv:1606.08415), elementwise."""
    if training_kernels.usable(x):
        y: Tensor = training_kernels.Gelu.apply(x)  # type: ignore[no-untyped-call]
        return y
    return F.gelu(x, approximate="tanh")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, of_gelu: bool
    ) -> Tensor:
        ctx.save_for_backward(input)
        # Not a saved tensor: recomputation (activation checkpointing) would hand out another one.
        ctx.weight = weight
        ctx.bias = None if bias is None else bias.dtype
        ctx.of_gelu = of_gelu
        if of_gelu:
            input = training_kernels.gelu(input)
        dtype = input.dtype
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (input,) = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_input = grad @ ctx.weight.to(grad.dtype)
        if ctx.of_gelu:
            y = torch.empty_like(input, memory_format=torch.contiguous_format)
            grad_input = training_kernels.gelu_backward(input, grad_input, y)
            input = y
        flat = grad.flatten(0, -2)
        add_product(ctx.weight, flat, input.flatten(0, -2))
        grad_bias = None if ctx.bias is None else flat.sum(0).to(ctx.bias)
        return grad_input, None, grad_bias, None


class Embedding(nn.Embedding):
    """``nn.Embedding``; with ``in_place`` it adds only the rows that were looked up."""

    def forward(self, input: Tensor) -> Tensor:
        if in_place(self.weight) and torch.is_grad_enabled():
            return cast(Tensor, _Embedding.apply(input, self.weight))  # type: ignore[no-untyped-call]
        return F.embedding(input, self.weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        rows = grad_outputs[0].flatten(0, -2).to(ctx.weight.dtype)
        ctx.weight.grad.index_add_(0, ids.flatten(), rows)
        return None, None
