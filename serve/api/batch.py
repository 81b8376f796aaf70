"""Many pieces of work in one call, each answered when it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

from serve.api.status import StatusError

FULL = ("QUEUE_FULL", "CALLER_RUNNING_LIMIT", "CALLER_WAITING_LIMIT")
"""Reasons of refusals that pass when other work ends."""

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Batch(Generic[Request, Answer]):
    """Runs requests in a window that moves on, and reads no more than there is room for.

    Args:
        work: answers one request.
        most: maximum number of requests that run at once.
    """

    def __init__(self, work: Callable[[Request], Awaitable[Answer]], most: int) -> None:
        self.work = work
        self.requests = self.answered = 0
        self._most = self._window = most
        self._running: dict[asyncio.Task[Answer], int] = {}
        self._given: dict[int, Request] = {}
        """Requests that have no answer yet."""
        self._refused: list[int] = []
        """Those of them for which there was no room."""

    async def answers(
        self, requests: AsyncIterator[Request]
    ) -> AsyncGenerator[tuple[int, Answer | StatusError], None]:
        """Yield the place of each request and its answer or failure, in any order.

        Raises:
            StatusError: there was no room for the first of them, or one could not be parsed.
        """

        async def read() -> tuple[Request] | None:
            async for request in requests:
                return (request,)
            return None

        reading: asyncio.Task[tuple[Request] | None] | None
        reading = asyncio.create_task(read())
        try:
            while reading or self._given:
                while self._refused and len(self._running) < self._window:
                    self._start(self._refused.pop())
                room = len(self._running) < self._window and not self._refused
                tasks: set[asyncio.Task[Any]] = set(self._running)
                if reading and room:
                    tasks.add(reading)
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if reading in done:
                    read_now, reading = reading.result(), None
                    if read_now is not None:
                        self._given[self.requests] = read_now[0]
                        self._start(self.requests)
                        self.requests += 1
                        reading = asyncio.create_task(read())
                for task in done & self._running.keys():
                    answer = await self._answer(task)
                    if answer is not None:
                        yield answer
        finally:
            tasks = {*self._running, *([reading] if reading else [])}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, index: int) -> None:
        async def work() -> Answer:
            return await self.work(self._given[index])

        self._running[asyncio.create_task(work())] = index

    async def _answer(self, task: asyncio.Task[Answer]) -> tuple[int, Answer | StatusError] | None:
        """What a task found, or None if it has to be tried again."""
        index = self._running.pop(task)
        error = task.exception()
        if isinstance(error, StatusError) and error.reason in FULL:
            # Other calls, or others of this batch, take the room.
            self._refused.append(index)
            self._window = max(1, len(self._running))
            if not self._running:
                if not self.answered:
                    raise error
                await asyncio.sleep(error.retry_after or 0)
            return None
        if error is not None and not isinstance(error, StatusError):
            raise error
        del self._given[index]
        self.answered += 1
        self._window = min(self._window + 1, self._most)
        return index, task.result() if error is None else error
