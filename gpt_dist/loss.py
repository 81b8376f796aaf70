"""Output head and cross-entropy in one piece, so that all logits never exist at once.

The head's gradient is computed chunk by chunk in the forward pass, as Liger-Kernel does
(arXiv:2410.10989): a step needs one chunk of logits instead of the batch's, and nothing of it is
kept for the backward pass but the gradients of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -1
"""Target of positions that do not count."""

CHUNK_BYTES = 1 << 28
"""Upper bound of one chunk of fp32 logits."""


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
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, vocab_size, dtype
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        backward = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        device = hidden.device.type
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        head = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if backward else None
        grad_weight = None
        with torch.no_grad(), torch.autocast(device, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                inputs, labels = hidden[part].to(dtype), targets[part]
                counted = labels != IGNORE
                labels = labels.clamp(min=0).unsqueeze(1)
                logits = inputs @ head.t()
                scores = logits[:, :vocab_size].float()
                log_sum = scores.logsumexp(dim=1, keepdim=True)
                losses = (log_sum - scores.gather(1, labels)).squeeze(1)
                total += (losses * counted).sum()
                if grad_hidden is None:
                    continue
                # d loss / d logits = softmax - one-hot; zero for padding and ignored positions.
                scores.sub_(log_sum).exp_()
                scores.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=scores.dtype))
                scores.mul_(counted.unsqueeze(1))
                logits[:, :vocab_size] = scores
                logits[:, vocab_size:] = 0
                grad_hidden[part] = logits @ head
                piece = logits.t() @ inputs
                grad_weight = piece.float() if grad_weight is None else grad_weight.add_(piece)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            (grad_hidden * scale).to(ctx.dtypes[0]),
            (grad_weight * scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )
