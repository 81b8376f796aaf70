"""Output head and cross-entropy fused, so that the whole batch's logits never exist at once.

The forward pass computes the gradients too, chunk by chunk, as Liger-Kernel does
(arXiv:2410.10989). A step holds one chunk of logits, and keeps only the gradients of its inputs
for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpt_dist.ops import native_training as native
from gpt_dist.ops import triton
from gpt_dist.ops.linear import add_product_, add_to_main_grad, fuses
from gpt_dist.ops.registry import register_in_place

CHUNK_BYTES = 1 << 28
"""Upper bound of one chunk of logits on a CPU, and on any device a size that is always allowed."""

GPU_CHUNK_BYTES = 1 << 32
"""Upper bound on a GPU, where every chunk rewrites the head's gradient; see `chunk_bytes`."""

GPU_SHARE = 32
"""A chunk takes at most one part in so many of a GPU's memory."""

PIECE = 8192
"""Rows of the head that are converted at once on a CPU."""

CACHED_BYTES = 1 << 21
"""Upper bound of the fp32 logits handled at once on a CPU, so that they stay in its cache."""


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)``, elementwise; with ``cap`` 0 the logits as they are."""
    return (logits / cap).tanh() * cap if cap else logits


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float = 0.0
) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: (N, C) activations.
        weight: (P, C) head; rows from ``vocab_size`` on are padding and are ignored.
        targets: (N,) token ids; a negative target is ignored.
        vocab_size: V, the number of classes.
        cap: of the logits, as `soft_cap`.

    Returns:
        The sum in nats, a scalar in fp32.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    # needs_input_grad of a Function ignores no_grad.
    wanted = torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, vocab_size, cap, dtype, wanted, fuses(weight)
    )
    return loss


def chunk_bytes(device: torch.device) -> int:
    """Upper bound of one chunk of logits on a device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return CHUNK_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK_BYTES, min(GPU_CHUNK_BYTES, memory // GPU_SHARE))


def chunk_rows(rows: int, row_bytes: int, most: int) -> int:
    """Rows of a chunk: as few chunks as ``most`` bytes allow, of equal size."""
    chunks = math.ceil(rows / max(1, most // row_bytes))
    return math.ceil(rows / chunks) if chunks else 1


def cross_entropy_(logits: Tensor, targets: Tensor, classes: int, cap: float = 0.0) -> Tensor:
    """Turn logits into the gradients of their cross-entropies, in place.

    Args:
        logits: (N, P); columns from ``classes`` on are padding and become zero.
        targets: (N,) int64; where one is negative, loss and gradients are zero.
        classes: number of classes.
        cap: the cross-entropies are those of ``soft_cap(logits, cap)``.

    Returns:
        (N,) cross-entropies in nats, fp32.
    """
    losses: Tensor = _cross_entropy_(logits, targets, classes, cap)
    return losses


def _gradients_(logits: Tensor, targets: Tensor, classes: int, cap: float) -> Tensor:
    counted = targets >= 0
    labels = targets.clamp(min=0).unsqueeze(1)
    scores = soft_cap(logits[:, :classes].float(), cap)
    softmax = scores.softmax(dim=1)
    # The largest probability is 1 / sum(exp(score - largest score)).
    log_sum = scores.amax(dim=1) - softmax.amax(dim=1).log()
    losses = (log_sum - scores.gather(1, labels).squeeze(1)) * counted
    softmax.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=softmax.dtype))
    # On a GPU `.all()` would synchronise.
    if logits.device.type != "cpu" or not counted.all():
        softmax.mul_(counted.unsqueeze(1))
    if cap:
        softmax.mul_(1 - (scores / cap).square_())  # the slope of the cap
    logits[:, :classes] = softmax
    logits[:, classes:] = 0
    return losses


def _cpu(logits: Tensor, targets: Tensor, classes: int, cap: float) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32)
    if native.takes(logits) and logits.is_contiguous():
        rows, columns = logits.shape
        native.run(
            "cross_entropy",
            logits.dtype,
            logits,
            targets.contiguous(),
            rows,
            columns,
            classes,
            cap,
            losses,
        )
        return losses
    rows = max(1, CACHED_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        losses[part] = _gradients_(logits[part], targets[part], classes, cap)
    return losses


def _cuda(logits: Tensor, targets: Tensor, classes: int, cap: float) -> Tensor:
    taken = logits.dtype in (torch.bfloat16, torch.float32) and logits.is_contiguous()
    if taken and triton.available():
        from gpt_dist.ops.triton import cross_entropy

        return cross_entropy.cross_entropy_(logits, targets, classes, cap)
    return _gradients_(logits, targets, classes, cap)


def _fake(logits: Tensor, targets: Tensor, classes: int, cap: float) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


_cross_entropy_ = register_in_place(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, int classes, float cap) -> Tensor",
    _gradients_,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


class _Head:
    """The output head in the dtype of its products, converted piece by piece on a CPU.

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

    def backward(self, slopes: Tensor, grad: Tensor) -> None:
        """Gradients (N, P) of logits → ``grad``, the gradients (N, C) of their inputs."""
        if self.rows >= len(self.weight):
            torch.mm(slopes, self.weight.to(self.dtype), out=grad)
            return
        total = torch.zeros_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        for rows, piece in self.pieces():
            total += slopes[:, rows] @ piece
        grad.copy_(total)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        cap: float,
        dtype: torch.dtype,
        wanted: bool,
        fused: bool,
    ) -> Tensor:
        backward = wanted and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        device = hidden.device.type
        row_bytes = dtype.itemsize * weight.shape[0]
        rows = chunk_rows(len(hidden), row_bytes, chunk_bytes(hidden.device))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if backward else None
        grad_weight = None
        with torch.no_grad(), torch.autocast(device, enabled=False):
            head = _Head(weight, dtype)
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                inputs, labels = hidden[part].to(dtype), targets[part]
                logits = head.logits(inputs)
                losses = cross_entropy_(logits, labels, vocab_size, cap)
                total += losses.sum()
                if grad_hidden is not None:
                    head.backward(logits, grad_hidden[part])
                if part.stop >= hidden.shape[0]:
                    del head  # before its gradient is made
                if grad_hidden is None or not ctx.needs_input_grad[1]:
                    pass
                elif fused:
                    add_to_main_grad(weight, logits, inputs)
                else:
                    fresh = grad_weight is None
                    if grad_weight is None:
                        wide = torch.promote_types(dtype, torch.float32)
                        grad_weight = torch.empty_like(weight, dtype=wide)
                    add_product_(grad_weight, logits, inputs, fresh)
                del logits  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.fused, ctx.dtypes = fused, (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        # On a GPU the comparison would wait for the device.
        if ctx.fused and scale.device.type == "cpu" and scale != 1:
            raise ValueError("within fused_accumulation, scale the gradients, not the loss")
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.dtypes[1]).mul_(scale)
        nothing = (None,) * 6
        return grad_hidden.to(ctx.dtypes[0]) * scale, grad_weight, *nothing
