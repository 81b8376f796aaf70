"""Log-likelihoods of continuations, in batches that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_dist.evaluation.validation import evaluating
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.compiling import uncompiled
from gpt_dist.parallel.world import World
from gpt_dist.text.tokenizers import Tokenizer

POSITIONS = 2048
"""Maximum number of positions scored in one forward pass, which bounds the memory of logits."""


class Request(NamedTuple):
    """The token ids that are given and those to be scored; neither is empty."""

    context: list[int]
    continuation: list[int]


class Scores(NamedTuple):
    """For each request the summed log-likelihood in nats, and whether greedy decoding yields it."""

    log_likelihood: Tensor
    greedy: Tensor


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokenise context and continuation together, then split them, as lm-evaluation-harness does.

    Spaces at the end of the context move to the continuation, because a GPT-2 token starts with
    its space. An empty context becomes the end-of-text token.
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
    """Log-likelihoods of continuations, the same on every rank.

    A request longer than the context loses its beginning. Of a continuation longer than the
    context only the end is scored.

    Args:
        model: switched to evaluation mode meanwhile.
        batch_size: most rows of one forward pass; rows of similar length go together.
        world: the ranks that share the requests; all must call this. None = this process alone.
        dtype: of the matrix products (autocast unless fp32).
        on_done: called with the number of requests that are done on all ranks, and of all.

    Returns:
        fp64 tensor (N,) and bool tensor (N,) on the CPU, in the order of the requests.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    batches = _batches(requests, batch_size, model.config.context_length)
    found = torch.zeros(2, len(requests), dtype=torch.float64)
    device, done = model.wte.weight.device, 0
    with (
        evaluating(model),
        # Every batch has its own shape: compiling each would take longer than running it.
        uncompiled(model),
        torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
    ):
        for first in range(0, len(batches), size):
            # A forward pass can be collective: a rank without a batch runs an empty one.
            mine = batches[first + rank] if first + rank < len(batches) else []
            found[:, mine] = _score_batch(model, [requests[i] for i in mine])
            done += sum(map(len, batches[first : first + size]))
            if on_done is not None:
                on_done(done, len(requests))
    if world:
        found = world.all_reduce(found)
    return Scores(found[0], found[1] > 0.5)


def _batches(requests: Sequence[Request], rows: int, context: int) -> list[list[int]]:
    """Indices of requests, those of similar length together, longest first.

    The longest come first so that a lack of memory shows at once. Few enough positions are
    scored in one batch to keep their logits small.
    """
    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
    batches: list[list[int]] = []
    scored = 0
    for i in order:
        count = min(context, len(requests[i].continuation))
        if not batches or len(batches[-1]) == rows or scored + count > POSITIONS:
            batches.append([])
            scored = 0
        batches[-1].append(i)
        scored += count
    return batches


def _score_batch(model: GPT, requests: Sequence[Request]) -> Tensor:
    """(2, N): log-likelihood, and 1 where greedy decoding yields the continuation."""
    limit = model.config.context_length
    rows = [(request.context + request.continuation)[-limit - 1 :] for request in requests]
    longest = max(map(len, rows), default=2)
    ids = torch.zeros(max(1, len(rows)), longest, dtype=torch.long)
    counted = torch.zeros(len(ids), longest - 1, dtype=torch.bool)
    for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)  # causal: nothing attends to the padding at the end
        counted[i, max(0, len(row) - 1 - len(request.continuation)) : len(row) - 1] = True
    device = model.wte.weight.device
    owner = counted.nonzero()[:, 0]
    targets = ids[:, 1:][counted].to(device)
    logits = model(ids[:, :-1].to(device), positions=counted.to(device)).float()
    likelihood = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)
    misses = logits.argmax(dim=1) != targets
    totals = torch.zeros(2, len(ids), dtype=torch.float64)
    totals[0].index_add_(0, owner, likelihood.double().cpu())
    totals[1] = torch.zeros(len(ids)).index_add_(0, owner, misses.float().cpu()) == 0
    return totals[:, : len(requests)]
