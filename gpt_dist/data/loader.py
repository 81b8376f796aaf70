"""Batches on the device: training batches in the data order, and the validation batches."""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt_dist.config.settings import Config
from gpt_dist.data.dataset import Dataset, open_dataset
from gpt_dist.data.order import Indices, TrainingData
from gpt_dist.data.shards import TokenStream
from gpt_dist.errors import GptDistError

if TYPE_CHECKING:
    from gpt_dist.text.tokenizers.base import Ids

IGNORE = -1
"""Target of a position that the loss leaves out."""


class Batch(NamedTuple):
    """``ids`` and ``targets``, (B, T) int64; the targets are the ids shifted by one position."""

    ids: Tensor
    targets: Tensor


def to_batch(tokens: Ids, device: torch.device) -> Batch:
    """Tokens (n, T + 1) as a batch on the device; a copy to a GPU is asynchronous."""
    whole = upload(torch.from_numpy(tokens.astype(np.int64)), device)
    return Batch(whole[:, :-1], whole[:, 1:])


def upload(tokens: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the host does not wait for a copy to a GPU."""
    if device.type == "cuda":
        return tokens.pin_memory().to(device, non_blocking=True)
    return tokens.to(device)


class Loader:
    """One rank's micro-batches, prefetched by a thread.

    Args:
        data: the training data.
        batch_sequences: sequences of one step over all ranks.
        micro_batch: sequences of one micro-batch on this rank.
        rank: this rank.
        world_size: number of ranks.
        consumed: sequences that earlier steps consumed; the loader has no other state.
        prefetch: reads that the thread may be ahead.
    """

    AHEAD = 1 << 12
    """Sequences whose order is computed at once; one costs about as much as many."""

    TOGETHER = 1 << 15
    """Tokens read at once: several micro-batches where they are small."""

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
        except BaseException as error:  # the training loop raises it
            self._queue.put(error)

    def _own_indices(self) -> Iterator[tuple[Indices, Indices]]:
        """Sources and starts, each (micro-batches, B), of this rank's next sequences.

        Rank r takes rows r·B … (r + 1)·B of each global micro-batch. Small micro-batches are read
        together, up to ``TOGETHER`` tokens, because each read has a fixed cost.
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
    """This rank's part of the first ``tokens`` predictions of the validation split (None: all).

    The windows do not overlap, so each token is predicted once, whatever the number of ranks. Every
    rank gets the same number of batches, all of shape (micro_batch, context), because a forward
    pass can be collective and a compiled one serves a single shape. Missing windows, and the end
    of a short one, have the target ``IGNORE``.
    """
    predictions = min(tokens or len(stream), len(stream) - 1)
    starts = np.arange(0, predictions, context, dtype=np.int64)
    rounds = math.ceil(len(starts) / (micro_batch * world_size))
    mine = starts[rank::world_size]
    for first in range(0, rounds * micro_batch, micro_batch):
        chosen = mine[first : first + micro_batch]
        ids = np.zeros((micro_batch, context), dtype=np.int64)
        targets = np.full((micro_batch, context), IGNORE, dtype=np.int64)
        whole = np.flatnonzero(chosen + context <= predictions)
        if len(whole):
            rows = stream.gather(chosen[whole], context + 1)
            ids[whole], targets[whole] = rows[:, :-1], rows[:, 1:]
        for row in range(len(whole), len(chosen)):
            length = predictions - int(chosen[row])
            piece = stream.read(int(chosen[row]), length + 1)
            ids[row, :length], targets[row, :length] = piece[:-1], piece[1:]
        yield Batch(
            upload(torch.from_numpy(ids), device), upload(torch.from_numpy(targets), device)
        )


def open_datasets(config: Config) -> list[Dataset]:
    """Open every data set of the mixture.

    Raises:
        GptDistError: they do not share one tokenizer, or one is damaged.
    """
    datasets = [open_dataset(path, config.data.tokenizer) for path in config.data.path]
    first = datasets[0]
    for other in datasets[1:]:
        if other.tokenizer.to_dict() != first.tokenizer.to_dict():
            raise GptDistError(
                f"{other.directory}: its tokenizer ({other.tokenizer.name}) is not that of "
                f"{first.directory} ({first.tokenizer.name}); a mixture needs one tokenizer"
            )
    return datasets
