"""Which tokens rank r sees at step s: a pure function of (fingerprint, seed, sequence index).

The shards of a data set form one stream of tokens. Windows of ``context_length + 1`` tokens start
at ``offset + i * stride``, with a new offset for each epoch; or they are rows packed from whole
documents (`gpt_dist.data.rows`). A keyed permutation, computed and not stored, orders the windows
of an epoch. Nothing depends on the number of ranks or on the
micro-batch, so a run can continue with the same data on other hardware.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpt_dist.config.settings import Config
from gpt_dist.data.dataset import Dataset
from gpt_dist.data.rows import DocumentRows
from gpt_dist.data.shards import TokenStream
from gpt_dist.errors import GptDistError

if TYPE_CHECKING:
    from gpt_dist.text.tokenizers.base import Ids

Indices = NDArray[np.int64]

BLOCK = 1024
"""Windows of one block of ``shuffle: blocks``."""

PATTERN = 4096
"""Period of a mixture: its weights are rounded to multiples of 1/4096."""


def key_of(*parts: object) -> int:
    """A 64-bit hash of all parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def permute(indices: Indices, size: int, key: int) -> Indices:
    """Apply the permutation of ``range(size)`` that ``key`` selects to each of ``indices``.

    A balanced Feistel network over the next even number of bits, applied again until the value is
    below ``size`` (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). It needs O(1)
    memory.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = [np.uint64(key_of(key, r)) for r in range(6)]

    def encrypt(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> half, values & mask
        for round_key in round_keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(32)
            left, right = right, left ^ (mixed & mask)
        return (left << half) | right

    values = encrypt(indices.astype(np.uint64))
    while (outside := values >= np.uint64(size)).any():
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


class WindowOrder:
    """The endless order in which the windows of one stream are visited.

    Args:
        tokens: length of the stream.
        context: tokens a window predicts; it holds one more.
        stride: tokens between the starts of two windows.
        shuffle: ``full``, ``blocks`` or ``none``.
        key: selects the order.
    """

    def __init__(self, tokens: int, context: int, stride: int, shuffle: str, key: int) -> None:
        self.stride, self.shuffle, self.key = stride, shuffle, key
        room = tokens - context - 1
        self.max_offset = 0 if shuffle == "none" else min(stride - 1, room)
        self.windows = (room - self.max_offset) // stride + 1 if room >= 0 else 0

    def starts(self, indices: Indices) -> Indices:
        """First token of each sequence index's window."""
        epochs, within = np.divmod(indices, self.windows)
        starts = np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            starts[chosen] = self._epoch(within[chosen], int(epoch))
        return starts

    def _epoch(self, within: Indices, epoch: int) -> Indices:
        if self.shuffle == "none":
            return within * self.stride
        key = key_of(self.key, epoch)
        offset = key % (self.max_offset + 1)
        if self.shuffle == "full":
            return offset + permute(within, self.windows, key) * self.stride
        # The last block may be shorter and stays last; the order of the full ones is a permutation.
        full_blocks = self.windows // BLOCK
        blocks, inside = np.divmod(within, BLOCK)
        order = np.empty_like(within)
        for block in np.unique(blocks):
            chosen = blocks == block
            source = block
            if block < full_blocks:
                source = permute(np.array([block]), full_blocks, key)[0]
            size = min(BLOCK, self.windows - int(source) * BLOCK)
            order[chosen] = source * BLOCK + permute(inside[chosen], size, key_of(key, int(source)))
        return offset + order * self.stride


class TrainingData:
    """The tokens of each sequence index, from one data set or a weighted mixture of several."""

    def __init__(self, config: Config, datasets: list[Dataset]) -> None:
        weights = list(config.data.path.values())
        self.context = config.model.context_length
        self.fingerprint = datasets[0].fingerprint
        if len(datasets) > 1:
            parts = [(d.fingerprint, w) for d, w in zip(datasets, weights, strict=True)]
            self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        self.streams: list[TokenStream | DocumentRows] = []
        self.orders: list[WindowOrder] = []
        for dataset in datasets:
            stream = dataset.split("train")
            if stream is None or len(stream) <= self.context:
                raise GptDistError(
                    f"{dataset.directory}: {len(stream) if stream else 0} training tokens do not "
                    f"fill one window of model.context_length + 1 = {self.context + 1}"
                )
            positions: TokenStream | DocumentRows = stream
            context, stride = self.context, config.stride
            if config.data.rows == "documents":  # a position is a whole row
                positions, context, stride = DocumentRows(dataset, stream, context + 1), 0, 1
            key = key_of(dataset.fingerprint, config.seed)
            self.streams.append(positions)
            self.orders.append(
                WindowOrder(len(positions), context, stride, config.data.shuffle, key)
            )
        self.windows = sum(order.windows for order in self.orders)
        self._dtype = np.result_type(*(stream.dtype for stream in self.streams))
        self._quotas, self._source, self._rank = _interleave(weights)

    def starts(self, indices: Indices) -> tuple[Indices, Indices]:
        """The stream that each sequence comes from, and the position of its first token there."""
        if len(self.orders) == 1:
            return np.zeros_like(indices), self.orders[0].starts(indices)
        periods, position = np.divmod(indices, len(self._source))
        sources = self._source[position]
        local = periods * self._quotas[sources] + self._rank[position]
        starts = np.empty_like(indices)
        for number, order in enumerate(self.orders):
            chosen = sources == number
            if chosen.any():
                starts[chosen] = order.starts(local[chosen])
        return sources, starts

    def gather(self, sources: Indices, starts: Indices) -> Ids:
        """(n, context + 1) tokens of the windows that ``starts`` names."""
        tokens = np.empty((len(starts), self.context + 1), dtype=self._dtype)
        for number, stream in enumerate(self.streams):
            chosen = sources == number
            if chosen.any():
                tokens[chosen] = stream.gather(starts[chosen], self.context + 1)
        return tokens

    def first_token(self) -> int:
        """The first token of the text: a prompt for tokenizers without an end-of-text token."""
        return int(self.streams[0].read(0, 1)[0])

    def sequences(self, indices: Indices) -> Ids:
        """(n, context + 1) tokens of the given sequence indices."""
        return self.gather(*self.starts(np.asarray(indices, dtype=np.int64)))


def _interleave(weights: list[float]) -> tuple[Indices, Indices, Indices]:
    """A periodic pattern that visits each source in proportion to its weight, evenly spread.

    Returns:
        The visits of each source in a period; the source at each position; and the number of
        earlier visits of that source in the period.
    """
    if len(weights) == 1:
        return np.ones(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    shares = np.array(weights) / sum(weights) * PATTERN
    quotas = np.maximum(1, np.floor(shares)).astype(np.int64)
    quotas[np.argsort(quotas - shares)[: max(0, PATTERN - int(quotas.sum()))]] += 1
    times = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
    sources = np.repeat(np.arange(len(weights)), quotas)
    ranks = np.concatenate([np.arange(q) for q in quotas])
    order = np.argsort(times, kind="stable")
    return quotas, sources[order], ranks[order]
