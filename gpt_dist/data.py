"""Which tokens rank r sees at step s: a pure function of (fingerprint, seed, sequence index).

The shards of a data set are one stream of tokens. Windows of ``context_length + 1`` tokens start
at ``offset + i * stride``, the offset drawn anew each epoch; the order of the windows within an
epoch is a keyed permutation that is computed, not stored. Nothing depends on the number of ranks or
on the micro-batch, so a run may continue on other hardware with the same data.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt_dist.config import Config
from gpt_dist.errors import GptDistError
from gpt_dist.loss import IGNORE
from gpt_dist.shards import Dataset, TokenStream, open_dataset

Indices = NDArray[np.int64]

BLOCK = 1024
"""Windows of one block of ``shuffle: blocks``."""

PATTERN = 4096
"""Period of a mixture: its weights are rounded to multiples of 1/4096."""


def key_of(*parts: object) -> int:
    """64 bits that depend on all parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def permute(indices: Indices, size: int, key: int) -> Indices:
    """Map each of ``indices`` by the permutation of ``range(size)`` that belongs to ``key``.

    A balanced Feistel network over the next even number of bits, walked until the value falls
    below ``size`` again (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): O(1)
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
        key: what the order depends on besides the sequence index.
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
        # The last, shorter block stays last: all others are full, so their order is a permutation.
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
    """Sequence index → tokens, over one data set or a weighted mixture of several."""

    def __init__(self, config: Config, datasets: list[Dataset]) -> None:
        weights = list(config.data.path.values())
        self.context = config.model.context_length
        self.fingerprint = datasets[0].fingerprint
        if len(datasets) > 1:
            parts = [(d.fingerprint, w) for d, w in zip(datasets, weights, strict=True)]
            self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        self.streams: list[TokenStream] = []
        self.orders: list[WindowOrder] = []
        for dataset in datasets:
            stream = dataset.split("train")
            if stream is None or len(stream) <= self.context:
                raise GptDistError(
                    f"{dataset.directory}: {len(stream) if stream else 0} training tokens do not "
                    f"fill one window of model.context_length + 1 = {self.context + 1}"
                )
            self.streams.append(stream)
            key = key_of(dataset.fingerprint, config.seed)
            self.orders.append(
                WindowOrder(len(stream), self.context, config.stride, config.data.shuffle, key)
            )
        self.windows = sum(order.windows for order in self.orders)
        self._quotas, self._source, self._rank = _interleave(weights)

    def starts(self, indices: Indices) -> tuple[Indices, Indices]:
        """Which stream each sequence comes from, and its first token there."""
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

    def gather(self, sources: Indices, starts: Indices) -> NDArray[np.uint16]:
        """(n, context + 1) tokens of the windows that ``starts`` names."""
        tokens = np.empty((len(starts), self.context + 1), dtype=np.uint16)
        for number, stream in enumerate(self.streams):
            chosen = sources == number
            if chosen.any():
                tokens[chosen] = stream.gather(starts[chosen], self.context + 1)
        return tokens

    def first_token(self) -> int:
        """What the text begins with: a prompt for tokenizers without an end-of-text token."""
        return int(self.streams[0].read(0, 1)[0])

    def sequences(self, indices: Indices) -> NDArray[np.uint16]:
        """(n, context + 1) tokens of the given sequence indices."""
        return self.gather(*self.starts(np.asarray(indices, dtype=np.int64)))


def _interleave(weights: list[float]) -> tuple[Indices, Indices, Indices]:
    """A periodic pattern that visits source k in proportion to its weight, evenly spread.

    Returns:
        Visits of each source in a period; the source at each position; how many visits of the same
        source come before that position.
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


class Batch(NamedTuple):
    """``ids`` and ``targets``: (B, T) int64; the targets are the ids one position further."""

    ids: Tensor
    targets: Tensor


def to_batch(tokens: NDArray[np.uint16], device: torch.device) -> Batch:
    """Tokens (n, T + 1) as a batch on the device; the copy to a GPU does not block."""
    whole = torch.from_numpy(tokens.astype(np.int64))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return Batch(whole[:, :-1], whole[:, 1:])


class Loader:
    """One rank's micro-batches, prefetched by a thread.

    Args:
        data: the training data.
        batch_sequences: sequences of one step over all ranks.
        micro_batch: sequences of one micro-batch on this rank.
        rank: this rank; ``world_size``: how many there are.
        consumed: sequences that earlier steps used up (the loader's whole state).
    """

    AHEAD = 1 << 12
    """Sequences whose order is computed at once: one costs about as much as many."""

    TOGETHER = 1 << 15
    """Tokens that are read at once, in several micro-batches where they are small."""

    def __init__(
        self,
        data: TrainingData,
        *,
        batch_sequences: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        consumed: int = 0,
        prefetch: int = 4,
    ) -> None:
        self.data, self.device = data, device
        self.consumed = self._planned = consumed
        self._sizes = batch_sequences, micro_batch, rank, world_size
        self._ready: deque[Batch] = deque()
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()

    def state_dict(self) -> dict[str, int]:
        return {"sequences": self.consumed}

    def step(self) -> Iterator[Batch]:
        """The micro-batches of the next optimizer step."""
        batch_sequences, micro_batch, _, world_size = self._sizes
        for _ in range(batch_sequences // (micro_batch * world_size)):
            if not self._ready:
                item = self._queue.get()
                if isinstance(item, BaseException):
                    raise item
                self._ready.extend(item)
            yield self._ready.popleft()
        self.consumed += batch_sequences

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _fill(self) -> None:
        try:
            for sources, starts in self._own_indices():
                if self._stop.is_set():
                    return
                tokens = self.data.gather(sources.reshape(-1), starts.reshape(-1))
                batch = to_batch(tokens, self.device)
                parts = (whole.split(starts.shape[1]) for whole in batch)
                self._queue.put([Batch(*pair) for pair in zip(*parts, strict=True)])
        except BaseException as error:  # delivered to the training loop, which raises it
            self._queue.put(error)

    def _own_indices(self) -> Iterator[tuple[Indices, Indices]]:
        """Sources and starts (micro-batches, B) of this rank's share of the coming micro-steps.

        That are the rows rank * B … of every world-wide micro-batch. As many micro-batches come
        together as make ``TOGETHER`` tokens, because small ones cost more to ask for than to read.
        """
        _, micro_batch, rank, world_size = self._sizes
        stride = micro_batch * world_size
        together = max(1, self.TOGETHER // (micro_batch * (self.data.context + 1)))
        ahead = max(together, self.AHEAD // stride)
        while True:
            every = np.arange(self._planned, self._planned + ahead * stride, dtype=np.int64)
            own = every.reshape(ahead, world_size, micro_batch)[:, rank]
            sources, starts = self.data.starts(own.reshape(-1))
            for first in range(0, ahead, together):
                part = slice(first, first + together)
                yield sources.reshape(own.shape)[part], starts.reshape(own.shape)[part]
            self._planned += ahead * stride


def validation_batches(
    stream: TokenStream,
    *,
    context: int,
    tokens: int | None,
    micro_batch: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """This rank's part of a fixed stretch of the validation split.

    The first ``tokens`` predictions (null: all) in windows that do not overlap, so each token is
    predicted once whatever the number of ranks; a shorter last window is filled with ``IGNORE``.
    """
    predictions = min(tokens or len(stream), len(stream) - 1)
    starts = np.arange(0, predictions, context, dtype=np.int64)[rank::world_size]
    for first in range(0, len(starts), micro_batch):
        chosen = starts[first : first + micro_batch]
        whole = chosen + context <= predictions
        rows = np.zeros((len(chosen), context + 1), dtype=np.uint16)
        if whole.any():
            rows[whole] = stream.gather(chosen[whole], context + 1)
        ids, targets = to_batch(rows, device)
        for row in np.flatnonzero(~whole):
            length = predictions - int(chosen[row])
            piece = torch.from_numpy(stream.read(int(chosen[row]), length + 1).astype(np.int64))
            ids, targets = ids.clone(), targets.clone()
            ids[row, :length] = piece[:-1].to(device)
            targets[row] = IGNORE
            targets[row, :length] = piece[1:].to(device)
        yield Batch(ids, targets)


def open_datasets(config: Config) -> list[Dataset]:
    """Open every data set of the mixture; all must share one tokenizer."""
    datasets = [open_dataset(path, config.data.tokenizer) for path in config.data.path]
    first = datasets[0]
    for other in datasets[1:]:
        if other.tokenizer.to_dict() != first.tokenizer.to_dict():
            raise GptDistError(
                f"{other.directory}: its tokenizer ({other.tokenizer.name}) is not that of "
                f"{first.directory} ({first.tokenizer.name}); a mixture needs one tokenizer"
            )
    return datasets
