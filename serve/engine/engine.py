"""Runs the scheduler in a thread, and hands its events to the event loop once per step.

A thread suffices: PyTorch releases the interpreter's lock while it computes. A process would have
to serialise every event (measurements: benchmarks/LOG.md).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from gpt_dist.inference.results import Weights
from serve.engine.jobs import Event, Failed, Job, Lost, Scoring, Sequence
from serve.engine.scheduler import Scheduler, losses

log = logging.getLogger("serve")


class EngineLost(Exception):
    """The engine's thread failed, and the server cannot continue."""


class Engine:
    """Runs a scheduler in a thread of its own.

    Call its methods in the event loop's thread only.

    Args:
        scheduler: the scheduler to run.
        loop: calls the listeners of the jobs.
        on_failure: called once in the loop if the thread fails.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        loop: asyncio.AbstractEventLoop,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.scheduler, self.clock = scheduler, scheduler.clock
        self.failure: BaseException | None = None
        self._progress = self.clock()
        """When the thread last completed a tick, or received work after it had none."""
        self._loop, self._on_failure = loop, on_failure
        self._wake = threading.Event()
        self._stopping = False
        self._shed = ""
        """Why no more jobs are taken."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: list[Sequence] | list[Scoring]) -> None:
        """Queue jobs, all or none.

        Raises:
            CallerFull: a limit of their caller is reached.
            QueueFull: the queue has no room for all of them.
            TooLate: they could not end before their deadline.
            EngineLost: the thread has failed, or `shed` was called.
        """
        if self.failure is not None:
            raise EngineLost(str(self.failure))
        if self._shed:
            raise EngineLost(self._shed)
        self._note_idle()
        self.scheduler.submit(jobs)
        self._wake.set()

    def cancel(self, jobs: list[Sequence] | list[Scoring]) -> None:
        """Drop jobs before the next step."""
        self.scheduler.cancel(jobs)
        self._wake.set()

    def shed(self, message: str) -> None:
        """End all jobs and accept no more. Listeners learn whether their job had begun."""
        self._shed = message
        jobs = [*self.scheduler.jobs.all(), *self.scheduler.jobs.displaced()]
        _deliver(losses(jobs, message, stopped=True))
        for job in jobs:
            job.cancelled = True
        self._wake.set()

    def swap(self, weights: Weights, version: str) -> None:
        """Use other weights for sequences that start from now on."""
        self._note_idle()
        self.scheduler.weights.swap(weights, version)
        self._wake.set()

    def stalled(self, seconds: float) -> bool:
        """Whether there is work, but no progress for this many seconds."""
        return self.scheduler.busy and self.clock() - self._progress > seconds

    def _note_idle(self) -> None:
        """Restart the measurement of progress: a thread without work has not stalled."""
        if not self.scheduler.busy:
            self._progress = self.clock()

    def stop(self, timeout: float = 10) -> None:
        """End the thread after its current tick. Waits for at most ``timeout`` seconds."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self.scheduler.busy:
                    self._wake.wait()
                    self._wake.clear()
                    continue
                events = self.scheduler.tick()
                self._progress = self.clock()
                if events:
                    self._loop.call_soon_threadsafe(_deliver, events)
        except BaseException as error:
            log.exception("the engine failed")
            self.failure = error
            self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        _deliver(self.scheduler.abandon(f"the engine failed: {type(error).__name__}"))
        self._on_failure(error)


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        try:
            job.listener(event)
        except Exception:  # one failing request must not affect the others
            log.exception("a request failed")
            job.cancelled = True
            if not isinstance(event, Lost | Failed):
                job.listener(Failed())
