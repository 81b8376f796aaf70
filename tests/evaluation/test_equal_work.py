"""Ranks make the same number of forward passes, because under ZeRO-3 each is collective."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt_dist.config.settings import ModelConfig
from gpt_dist.data.loader import IGNORE, validation_batches
from gpt_dist.data.shards import TokenStream
from gpt_dist.evaluation.scoring import POSITIONS, Request, score
from gpt_dist.evaluation.validation import evaluating
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.world import World

CPU = torch.device("cpu")
CONTEXT = 8


class Stream:
    """A split whose tokens are 0, 1, 2, …"""

    dtype = np.dtype(np.uint16)

    def __init__(self, length: int) -> None:
        self.tokens = np.arange(length, dtype=self.dtype)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> Any:
        return self.tokens[start : start + length]

    def gather(self, starts: Any, length: int) -> Any:
        return self.tokens[starts[:, None] + np.arange(length)]


class Alone(World):
    """One rank of several, whose collectives do nothing."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=CONTEXT, vocab_size=50)
    return GPT(config)


@pytest.mark.parametrize("predictions", [1, 7, 8, 9, 16, 40, 41, 64, 65, 95, 96, 97, 200])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_validation_batches_are_as_many_and_alike_on_every_rank(
    predictions: int, ranks: int
) -> None:
    stream = cast(TokenStream, Stream(predictions + 1))
    counts, seen = set(), []
    for rank in range(ranks):
        found = list(
            validation_batches(
                stream, context=CONTEXT, tokens=None, micro_batch=3, rank=rank,
                world_size=ranks, device=CPU,
            )
        )  # fmt: skip
        counts.add(len(found))
        for ids, targets in found:
            assert ids.shape == targets.shape == (3, CONTEXT)
            counted = targets != IGNORE
            assert torch.equal(ids[counted] + 1, targets[counted])
            seen += targets[counted].tolist()
    assert len(counts) == 1
    assert sorted(seen) == list(range(1, predictions + 1))  # every token once


@pytest.mark.parametrize("count", [1, 5, 6, 7, 12, 13])
def test_scoring_makes_as_many_passes_on_every_rank(model: GPT, count: int) -> None:
    requests = [Request([1, 2, n], [3, 4][: 1 + n % 2]) for n in range(count)]
    expected = score(model, requests, batch_size=3)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    total, lengths, reports = torch.zeros(count, dtype=torch.float64), set(), []
    for rank in range(2):
        passes.clear()
        world = Alone(rank, 2, rank, 2, CPU)
        total += score(
            model, requests, batch_size=3, world=world,
            on_done=lambda done, of: reports.append((done, of)),
        ).log_likelihood  # fmt: skip
        lengths.add(len(passes))
    assert len(lengths) == 1
    torch.testing.assert_close(total, expected.log_likelihood)
    assert reports[-1] == (count, count)


def test_a_forward_pass_has_few_logits(model: GPT) -> None:
    rows: list[int] = []
    model.register_forward_hook(lambda _, __, logits: rows.append(len(logits)))
    score(model, [Request([1], [2] * CONTEXT)] * 300, batch_size=1000)
    assert sum(rows) == 300 * CONTEXT
    assert max(rows) <= POSITIONS
    assert len(rows) == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(model: GPT, training: bool) -> None:
    model.train(training)
    with evaluating(model):
        assert not model.training
    assert model.training == training
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training == training


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "tensor", None)
    world = World(0, 1, 0, 1, CPU)
    assert world.any(True) is True
    assert world.any(False) is False
