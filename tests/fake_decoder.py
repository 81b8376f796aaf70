"""A decoder without arithmetic: tokens are hashes of what the slot has cached."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from gpt_dist.config.settings import ModelConfig
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.results import Chunk
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT

VOCABULARY = 50


class FakeBackend:
    """Caches token ids, each marked with the weights that computed it, and counts its work.

    Args:
        slots: rows of the cache.
        context: positions of a slot.
        dense: a step computes all slots up to the highest active one, as PyTorch's backend does.
    """

    name, cache_bytes, rows_at_once = "fake", 0, 64

    def __init__(self, slots: int, context: int, dense: bool) -> None:
        self.dense = dense
        self.cache = np.zeros((slots, context), np.int64)
        self.seeds = [0] * slots
        self.weights = 0
        self.computed = self.copied = self.steps = 0
        """Tokens that were prefilled, tokens that were copied, steps."""

    def load(self, model: GPT) -> int:
        self.weights += 1
        return self.weights

    def set(self, slot: int, params: SamplingParams, ids: Any, generated: int = 0) -> None:
        self.seeds[slot] = params.seed

    def rows(self, highest: int) -> int:
        return highest + 1 if self.dense else 1

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache[target, :length] = self.cache[source, :length]
        self.cache[target, length:] = -1
        self.copied += length

    def prefill(self, weights: int, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            end = chunk.start + len(chunk.ids)
            self.cache[chunk.slot, chunk.start : end] = chunk.ids + VOCABULARY * weights
            self.cache[chunk.slot, end:] = -1
            self.computed += len(chunk.ids)

    def logits(self, weights: int, chunk: Chunk) -> torch.Tensor:
        self.prefill(weights, [chunk])
        ends = range(chunk.start + 1, chunk.start + 1 + len(chunk.ids))
        rows = [chosen(self.cache[chunk.slot, :end], 0) for end in ends]
        return torch.nn.functional.one_hot(torch.tensor(rows), VOCABULARY).float()

    def step(
        self, weights: int, slots: np.ndarray, ids: np.ndarray, positions: np.ndarray, *_: Any
    ) -> list[np.ndarray]:
        self.steps += 1
        tokens: list[int] = []
        for row, (slot, token, at) in enumerate(zip(slots, ids, positions, strict=True)):
            self.cache[slot, at] = token + VOCABULARY * weights
            guess = row > 0 and slots[row - 1] == slot
            wrong = guess and tokens[-1] != token
            tokens.append(-1 if wrong else chosen(self.cache[slot, : at + 1], self.seeds[slot]))
        return [np.array(tokens)]


def chosen(cached: np.ndarray, seed: int) -> int:
    """The token that follows these cache entries.

    One in four depends on all of them, the others on the last one only: so text repeats itself, and
    can be guessed.
    """
    key = seed.to_bytes(8, "little")
    every = zlib.crc32(cached.tobytes() + key)
    return (zlib.crc32(cached[-1:].tobytes() + key) if every % 4 else every // 4) % VOCABULARY


def expected(ids: list[int], seed: int, weights: int, count: int) -> list[int]:
    """The tokens that a sequence gets which has the decoder to itself."""
    tokens = list(ids)
    for _ in range(count):
        tokens.append(chosen(np.array(tokens) + VOCABULARY * weights, seed))
    return tokens[len(ids) :]


def fake_model(context: int) -> GPT:
    return GPT(
        ModelConfig(n_layer=0, n_head=1, n_embd=4, context_length=context, vocab_size=VOCABULARY)
    )


def fake_decoder(
    slots: int,
    context: int,
    dense: bool = False,
    deterministic: bool = False,
    speculate: bool = False,
) -> tuple[Decoder, FakeBackend]:
    """A decoder on a `FakeBackend`, and that backend. Its n-th weights have the number n.

    With ``speculate`` a step costs the same for any number of rows, so that it guesses much.
    """
    backend = FakeBackend(slots, context, dense)
    with mock.patch("gpt_dist.inference.decoder.make_backend", return_value=backend):
        decoder = Decoder(
            fake_model(context), max_slots=slots, deterministic=deterministic, speculate=speculate
        )
    if decoder.speculator:
        decoder.speculator.times.estimate = lambda rows: np.ones(rows + 1)  # type: ignore[method-assign]
    return decoder, backend
