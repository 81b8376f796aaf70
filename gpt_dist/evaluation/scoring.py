"""How likely a model finds a continuation: many of them, in batches, shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.world import World
from gpt_dist.text.tokenizers import Tokenizer

ROWS = 1024
"""Positions whose logits exist at the same time."""


class Request(NamedTuple):
    """Token ids that are given, and those that are scored; neither is empty."""

    context: list[int]
    continuation: list[int]


class Scores(NamedTuple):
    """One entry a request: summed log-likelihood in nats, and whether greedy decoding says it."""

    log_likelihood: Tensor
    greedy: Tensor


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokenise a text in one piece and cut it, as lm-evaluation-harness does.

    Spaces at the end of the context go to the continuation, where GPT-2's tokens have them. An
    empty context becomes the end-of-text token.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        prefix = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
        ids = tokenizer.encode(continuation)
        return Request(prefix, ids) if prefix else Request(ids[:1], ids[1:])
    given = len(tokenizer.encode(stripped))
    whole = tokenizer.encode(stripped + continuation)
    return Request(whole[:given], whole[given:])


@torch.no_grad()
def score(
    model: GPT,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    world: World | None = None,
    dtype: torch.dtype = torch.float32,
    on_done: Callable[[int, int], None] | None = None,
) -> Scores:
    """Log-likelihoods of continuations; every rank gets all of them.

    A request longer than the context loses its beginning (of a continuation longer than the
    context, only the end counts).

    Args:
        model: switched to evaluation mode meanwhile.
        batch_size: rows of one forward pass; rows of similar length go together.
        world: the ranks that share the requests, all of which call this; None = this process.
        dtype: arithmetic of the matrix products (autocast where it is not fp32).
        on_done: called with the number of requests finished on all ranks, and of all requests.

    Returns:
        fp64 tensor (N,) and bool tensor (N,) on the CPU, in the order of the requests.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    device = model.wte.weight.device
    # Longest first: what does not fit into memory shows at once.
    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
    mine = order[rank::size]
    found = torch.zeros(2, len(requests), dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            for start in range(0, len(mine), batch_size):
                part = mine[start : start + batch_size]
                found[:, part] = _score_batch(model, [requests[i] for i in part])
                if on_done is not None:
                    on_done(min(len(requests), size * (start + len(part))), len(requests))
    finally:
        model.train(training)
    if world:
        found = world.all_reduce(found)
    return Scores(found[0], found[1] > 0.5)


def _score_batch(model: GPT, requests: Sequence[Request]) -> Tensor:
    """(2, N): log-likelihood, and 1 where greedy decoding says the continuation."""
    limit = model.config.context_length
    rows = [(request.context + request.continuation)[-limit - 1 :] for request in requests]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    counted = torch.zeros(len(rows), longest - 1, dtype=torch.bool)
    for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)  # padding comes after, where nothing sees it
        counted[i, max(0, len(row) - 1 - len(request.continuation)) : len(row) - 1] = True
    device = model.wte.weight.device
    owner = counted.nonzero()[:, 0]
    targets = ids[:, 1:][counted].to(device)
    hidden = model.hidden(ids[:, :-1].to(device))[counted.to(device)]
    likelihoods, hits = [], []
    for start in range(0, len(hidden), ROWS):
        part, wanted = hidden[start : start + ROWS], targets[start : start + ROWS]
        logits = F.linear(part, model.head_weight)[:, : model.vocab_size].float()
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        likelihoods.append((chosen - logits.logsumexp(dim=1)).cpu())
        hits.append((logits.argmax(dim=1) == wanted).cpu())
    totals = torch.zeros(2, len(requests), dtype=torch.float64)
    totals[0].index_add_(0, owner, torch.cat(likelihoods).double())
    misses = torch.zeros(len(requests)).index_add_(0, owner, (~torch.cat(hits)).float())
    totals[1] = misses == 0
    return totals
