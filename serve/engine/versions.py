"""The weights that a decoder computes with, by name, and those that it uses next."""

from __future__ import annotations

import threading
from collections import Counter

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.results import Weights


class Versions:
    """Names a decoder's weights. Any thread may use it, but for `apply`.

    Args:
        decoder: whose weights.
        name: of its present weights.
    """

    def __init__(self, decoder: Decoder, name: str) -> None:
        self._decoder = decoder
        self._lock = threading.Lock()
        self._names = {decoder.weights.version: name}
        self._pending: tuple[Weights, str] | None = None
        self._held: Counter[int] = Counter()
        """Versions that sequences without a slot go on with."""

    @property
    def newest(self) -> str:
        """Name of the weights for new sequences."""
        with self._lock:
            pending = self._pending
            return pending[1] if pending else self._names[self._decoder.weights.version]

    @property
    def pending(self) -> bool:
        """Whether there are weights that `apply` would put to use."""
        return self._pending is not None

    @property
    def live(self) -> int:
        """Sets of weights in memory: those of running sequences, the newest, and the next."""
        with self._lock:
            return len(self._in_use()) + self.pending

    def of(self, slot: int) -> str:
        """Name of the weights that a slot's cache was computed with."""
        return self._names[self._decoder.version(slot)]

    def hold(self, weights: Weights) -> None:
        """Note that a sequence goes on with these weights when it gets a slot."""
        with self._lock:
            self._held[weights.version] += 1

    def release(self, weights: Weights | None) -> None:
        """Note the end of a `hold`; None is none."""
        if weights is not None:
            with self._lock:
                self._held[weights.version] -= 1
                self._held += Counter()  # drops zeros

    def swap(self, weights: Weights, name: str) -> None:
        """Have `apply` put other weights to use."""
        with self._lock:
            self._pending = weights, name

    def apply(self) -> None:
        """Let sequences that start from now on run with the weights of the last `swap`."""
        with self._lock:
            if self._pending is None:
                return
            weights, name = self._pending
            self._names[weights.version] = name
            self._decoder.use(weights)
            self._pending = None
            live = self._in_use()
            self._names = {key: name for key, name in self._names.items() if key in live}

    def _in_use(self) -> set[int]:
        """Versions of the weights of all slots, of sequences without one, and of the newest."""
        decoder = self._decoder
        versions = {decoder.version(slot) for slot in range(decoder.max_slots)}
        return versions - {0} | {decoder.weights.version} | set(self._held)
