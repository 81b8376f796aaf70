"""Many requests in one call, each answered when it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.served import Served
from serve.api.serving import Serving
from serve.api.status import StatusError


class Batch:
    """The requests of one call of GenerateBatch.

    Twice as many run as there are slots, so that the engine's queue has work when a slot becomes
    free. Further requests are not read before there is room for them.

    Args:
        serving: answers them.
        served: the model.
        seconds: until the caller gives up; None if never.
    """

    def __init__(self, serving: Serving, served: Served, seconds: float | None) -> None:
        self.serving, self.served, self.seconds = serving, served, seconds
        self.requests = self.answered = 0
        self.tokens = {"prompt_tokens": 0, "completion_tokens": 0}
        """Of the answered requests."""
        self._most = self._window = 2 * served.limits.max_slots
        self._running: dict[asyncio.Task[api.GenerateResponse], int] = {}
        self._given: dict[int, api.GenerateRequest] = {}
        """Requests that have no answer yet."""
        self._refused: list[int] = []
        """Those of them that found the queue full."""

    async def answers(
        self, requests: AsyncIterator[api.GenerateBatchRequest]
    ) -> AsyncGenerator[api.GenerateBatchResponse, None]:
        """Yield an answer to each request, in any order.

        Raises:
            StatusError: there was no room for the first of them, or one could not be parsed.
        """

        async def read() -> api.GenerateBatchRequest | None:
            return await anext(requests, None)

        reading: asyncio.Task[api.GenerateBatchRequest | None] | None
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
                    message = reading.result()
                    reading = None
                    if message is not None:
                        self._given[self.requests] = message.request
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
        self._running[asyncio.create_task(self._generate(self._given[index]))] = index

    async def _generate(self, request: api.GenerateRequest) -> api.GenerateResponse:
        async with self.serving.part(self.served, request, self.seconds) as call:
            return await call.finished()

    async def _answer(
        self, task: asyncio.Task[api.GenerateResponse]
    ) -> api.GenerateBatchResponse | None:
        """The answer that a task found, or None if it has to be tried again."""
        index = self._running.pop(task)
        error = task.exception()
        answer = api.GenerateBatchResponse(request_index=index)
        if error is None:
            answer.response.CopyFrom(task.result())
            for name in self.tokens:
                self.tokens[name] += getattr(answer.response.usage, name)
        elif not isinstance(error, StatusError):
            raise error
        elif error.reason == "QUEUE_FULL":  # other calls fill the queue
            self._refused.append(index)
            self._window = max(1, len(self._running))
            if not self._running:
                if not self.answered:
                    raise error
                await asyncio.sleep(error.retry_after or 0)
            return None
        else:
            answer.error.CopyFrom(error.status())
        del self._given[index]
        self.answered += 1
        self._window = min(self._window + 1, self._most)
        return answer
