"""Follows a training run: switches to each new checkpoint, whatever goes wrong with one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any

from gpt_dist.checkpoints.checkpoint import resolve
from gpt_dist.errors import GptDistError, describe
from serve.engine.engine import Engine
from serve.engine.loading import Loaded, load_next
from serve.health import WATCH, Health
from serve.metrics import Metrics
from serve.options import Options

log = logging.getLogger("serve")

MAX_WEIGHTS = 2
"""Maximum number of weight sets in memory: the newest, plus one that is loading or still in use.
Without a limit, a run that saves often would exhaust the memory."""
LONGEST_WAIT = 300.0
"""Seconds between two attempts to load the same checkpoint, at most."""


class Follower:
    """Looks for new checkpoints.

    Any failure is logged, counted and reported as the health of `WATCH`, and the current weights
    stay. The checkpoint is retried with exponential backoff, because the failure may be temporary:
    training may delete a checkpoint while it is read.

    Args:
        options: ``checkpoint`` and ``watch_interval``.
        loaded: what is served now.
        engine: gets the weights.
        metrics: count attempts.
        health: shows whether the newest checkpoint is served.
    """

    def __init__(
        self, options: Options, loaded: Loaded, engine: Engine, metrics: Metrics, health: Health
    ) -> None:
        self._options, self._loaded, self._engine = options, loaded, engine
        self._metrics, self._health, self._clock = metrics, health, engine.clock
        self._serves: Any = identity(loaded.directory)
        self._failed: Any = None
        """The checkpoint that the latest attempts failed for."""
        self.failures = 0
        """How many of them."""
        self._not_before = 0.0
        health.set_one(WATCH, True)

    async def run(self) -> None:
        """Look again and again; never returns."""
        while True:
            await asyncio.sleep(self._options.watch_interval)
            await self.look()

    async def look(self) -> None:
        """Load the newest checkpoint if it is not served yet."""
        found: Any = None
        try:
            directory, found = await asyncio.to_thread(self._newest)
            if found == self._serves:
                self._succeeded()
                return
            scheduler = self._engine.scheduler
            if self._must_wait(found) or scheduler.weights.live >= MAX_WEIGHTS:
                return
            weights, version = await asyncio.to_thread(
                load_next, self._loaded.decoder, self._loaded.tokenizer, directory
            )
            self._engine.swap(weights, version)
        except Exception as error:
            if not self._must_wait(found):
                self._note_failure(found, error)
            return
        self._serves = found
        self._metrics.reloads.labels("ok").inc()
        self._metrics.serving(version)
        self._succeeded()
        log.info("now serving weights %s", version)

    def _newest(self) -> tuple[Path, Any]:
        directory = resolve(self._options.checkpoint)
        return directory, identity(directory)

    def _must_wait(self, found: Any) -> bool:
        return bool(self.failures) and found == self._failed and self._clock() < self._not_before

    def _succeeded(self) -> None:
        self.failures = 0
        self._health.set_one(WATCH, True)

    def _note_failure(self, found: Any, error: Exception) -> None:
        self.failures = self.failures + 1 if found == self._failed else 1
        self._failed = found
        wait = min(self._options.watch_interval * 2.0 ** min(self.failures, 30), LONGEST_WAIT)
        self._not_before = self._clock() + wait
        self._metrics.reloads.labels("failed").inc()
        self._health.set_one(WATCH, False)
        expected = isinstance(error, GptDistError | OSError)
        reason = describe(error) if expected else f"{type(error).__name__}: {error}"
        log.warning(
            "keeping the old weights: %s; trying again in %g s",
            reason,
            wait,
            exc_info=None if expected else error,
        )


def identity(directory: Path) -> tuple[Path, Any]:
    """Identify a checkpoint. A later one may have the same name."""
    path = directory / "state.json"
    with contextlib.suppress(OSError):
        return directory, (path if path.exists() else directory).stat().st_mtime_ns
    return directory, None
