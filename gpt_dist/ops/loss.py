"""Output head and cross-entropy in one piece, so that all logits never exist at once.

The head's gradient is computed chunk by chunk in the forward pass, as Liger-Kernel does
(arXiv:2410.10989): a step needs one chunk of logits instead of the batch's, and nothing of it is
kept for the backward pass but the gradients of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpt_dist.ops import training_kernels
from gpt_dist.ops.linear import add_product, in_place

IGNORE = -1
"""Target of positions that do not count."""

CHUNK_BYTES = 1 << 28
"""Upper bound of one chunk of logits."""

PIECE = 8192
"""Rows of the head that a CPU converts at once."""

CACHED_BYTES = 1 << 21
"""Upper bound of the fp32 scores that a CPU works on at once, so that they stay in its cache."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int
) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: (N, C) activations.
        weight: (P, C) head; rows from ``vocab_size`` to P are padding and take no part.
        targets: (N,) token ids; ``IGNORE`` where a position does not count.
        vocab_size: V, the classes that exist.

    Returns:
        The sum in nats, a scalar in fp32.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    # Without gradients a Function's needs_input_grad still tells what the inputs alone require.
    wanted = torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, vocab_size, dtype, wanted
    )
    return loss


def _softmax_minus_one_hot_(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Turn logits (N, P) into the gradients of their cross-entropies, in place.

    Returns:
        (N,) cross-entropies in nats, fp32; zero where the target is ``IGNORE``.
    """
    if training_kernels.usable(logits):
        return training_kernels.cross_entropy_(logits, targets, vocab_size)
    losses = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, CACHED_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        counted = targets[part] != IGNORE
        labels = targets[part].clamp(min=0).unsqueeze(1)
        scores = logits[part, :vocab_size].float()
        softmax = scores.softmax(dim=1)
        # The largest probability is 1 / sum(exp(score - largest score)).
        log_sum = scores.amax(dim=1) - softmax.amax(dim=1).log()
        losses[part] = (log_sum - scores.gather(1, labels).squeeze(1)) * counted
        softmax.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=softmax.dtype))
        if logits.device.type != "cpu" or not counted.all():  # elsewhere asking would wait
            softmax.mul_(counted.unsqueeze(1))
        logits[part, :vocab_size] = softmax
    logits[:, vocab_size:] = 0
    return losses


class _Head:
    """The output head in the dtype of its products; a CPU converts it piece by piece.

    Args:
        weight: (P, C).
        dtype: of the products.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        piecewise = weight.device.type == "cpu" and weight.dtype != dtype
        self.weight, self.dtype = weight if piecewise else weight.to(dtype), dtype
        self.rows = PIECE if piecewise else len(weight)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.weight), self.rows):
            rows = slice(start, start + self.rows)
            yield rows, self.weight[rows].to(self.dtype)

    def logits(self, inputs: Tensor) -> Tensor:
        """(N, C) → (N, P)."""
        logits = inputs.new_empty(len(inputs), len(self.weight))
        for rows, piece in self.pieces():
            torch.mm(inputs, piece.t(), out=logits[:, rows])
        return logits

    def backward(self, slopes: Tensor) -> Tensor:
        """Gradients (N, P) of logits → gradients (N, C) of their inputs."""
        total: Tensor | None = None
        for rows, piece in self.pieces():
            part = slopes[:, rows] @ piece
            total = part if total is None else total.float().add_(part)
        assert total is not None
        return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        dtype: torch.dtype,
        wanted: bool,
    ) -> Tensor:
        backward = wanted and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        device = hidden.device.type
        rows = max(1, CHUNK_BYTES // (dtype.itemsize * weight.shape[0]))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if backward else None
        grad_weight = None
        with torch.no_grad(), torch.autocast(device, enabled=False):
            head = _Head(weight, dtype)
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                inputs, labels = hidden[part].to(dtype), targets[part]
                logits = head.logits(inputs)
                losses = _softmax_minus_one_hot_(logits, labels, vocab_size)
                total += losses.sum()
                if grad_hidden is None:
                    continue
                grad_hidden[part] = head.backward(logits)
                if not ctx.needs_input_grad[1]:
                    continue
                if in_place(weight):
                    add_product(weight, logits, inputs)
                    continue
                piece = logits.t() @ inputs
                grad_weight = piece.float() if grad_weight is None else grad_weight.add_(piece)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.added, ctx.dtypes = in_place(weight), (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        if ctx.added and scale != 1:
            raise ValueError("gradients added in place are those of the sum: scale them, not it")
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.dtypes[1]).mul_(scale)
        return grad_hidden.to(ctx.dtypes[0]) * scale, grad_weight, None, None, None, None
