"""What all protocols share: the model that is served, and the work accepted for it.

A protocol turns its requests into messages of ``gpt_dist.v1`` and hands them to `Serving`. It gets
messages back, or a `StatusError`, and turns these into its own answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from gpt_dist.errors import UsageError
from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.callers import caller
from serve.api.generation import Call
from serve.api.logprobs import score_response
from serve.api.parsing import (
    MAX_TEXT,
    MAX_TOP_LOGPROBS,
    RESPONSE_BYTES,
    SAMPLING,
    parse_generation,
    parse_priority,
    parse_prompt,
    parse_salt,
    tokenize,
)
from serve.api.served import Served
from serve.api.status import (
    StatusError,
    expired,
    internal,
    invalid,
    lost,
    other_weights,
    refused,
    too_large,
    unavailable,
)
from serve.engine.engine import EngineLost
from serve.engine.jobs import Displaced, Event, Expired, Lost, Scored, Scoring
from serve.engine.refusals import REFUSALS, QueueFull, Refusal
from serve.metrics import Metrics


class Serving:
    """The served model, and the calls that were accepted and have not ended.

    Args:
        metrics: counts calls and tokens.
        stream_interval: minimum time between two messages of a stream, in seconds.
    """

    def __init__(self, metrics: Metrics, stream_interval: float = 0.0) -> None:
        self.metrics, self.stream_interval = metrics, stream_interval
        self.served: Served | None = None
        """The model; None until it is loaded."""
        self.draining = False
        self.open_calls = 0
        self.idle = asyncio.Event()
        """Whether no call is open."""
        self.idle.set()

    def accept(self, model: str = "") -> Served:
        """Return the model, if the server accepts new work for it.

        Raises:
            StatusError: UNAVAILABLE, or NOT_FOUND for the name of another model.
        """
        if self.draining:
            raise unavailable("the server is shutting down", "DRAINING")
        if self.served is None:
            raise unavailable("the model is loading", "LOADING")
        if self.served.engine.failure is not None:
            raise unavailable("the engine failed", "ENGINE_FAILED")
        self.served.check_model(model)
        return self.served

    def __enter__(self) -> Serving:
        self.open_calls += 1
        self.idle.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.open_calls -= 1
        if not self.open_calls:
            self.idle.set()

    def refused(self, error: Refusal | EngineLost) -> StatusError:
        """The status of a call that the engine did not accept."""
        if isinstance(error, EngineLost):
            return unavailable(str(error), "DRAINING" if self.draining else "ENGINE_FAILED")
        assert self.served is not None
        return refused(error, self.served.engine.scheduler.jobs.retry_after)

    def check_room(self, served: Served) -> None:
        """Refuse work before anything is done for it, if there is no room for it.

        Raises:
            StatusError: RESOURCE_EXHAUSTED.
        """
        who = caller.get()
        try:
            served.engine.scheduler.jobs.check(who.terms.account or who.id, who.terms)
        except REFUSALS as error:
            raise self.refused(error) from None

    @asynccontextmanager
    async def generation(
        self, served: Served, request: Any, seconds: float | None, whole: bool = True
    ) -> AsyncIterator[Call]:
        """Begin to answer a request. Leaving the context cancels what is unfinished.

        Args:
            served: the model, from `accept`.
            request: GenerateRequest or GenerateStreamRequest.
            seconds: until the caller gives up; None if never.
            whole: whether all outputs will be one message.

        Raises:
            StatusError: the request is invalid, or there is no room for it.
        """
        with self:
            async with self.part(served, request, seconds, whole) as call:
                yield call

    @asynccontextmanager
    async def part(
        self, served: Served, request: Any, seconds: float | None, whole: bool = True
    ) -> AsyncIterator[Call]:
        """As `generation`, for a request that is part of a call that is open already."""
        deadline = None if seconds is None else served.engine.clock() + seconds
        served.check_model(request.model)
        self.check_room(served)
        wanted = await parse_generation(request, served.limits, whole)
        most = caller.get().terms.most(served.limits.max_slots)
        if most is not None and wanted.outputs > most:
            raise invalid(f"{SAMPLING}.n", f"{wanted.outputs} exceeds the caller's limit, {most}")
        served.check_weights(wanted.expected_weights_version)
        try:
            with Call(wanted, served, self.metrics, deadline) as call:
                yield call
        except (*REFUSALS, EngineLost) as error:
            raise self.refused(error) from None

    async def score(
        self, request: api.ScoreRequest, seconds: float | None = None
    ) -> api.ScoreResponse:
        """Compute the log-probabilities of a text.

        Args:
            request: the text.
            seconds: until the caller gives up; None if never.

        Raises:
            StatusError: the request is invalid, there is no room for it, the deadline passed, or
                the engine failed.
        """
        served = self.accept(request.model)
        with self:
            return await self.score_part(served, request, seconds)

    async def score_part(
        self, served: Served, request: api.ScoreRequest, seconds: float | None = None
    ) -> api.ScoreResponse:
        """As `score`, for a request that is part of a call that is open already."""
        deadline = None if seconds is None else served.engine.clock() + seconds
        expected = request.expected_weights_version
        served.check_weights(expected)
        salt, priority = parse_salt(request), parse_priority(request)
        if request.top_logprobs > MAX_TOP_LOGPROBS:
            raise invalid("top_logprobs", f"exceeds {MAX_TOP_LOGPROBS}")
        prepend, eot_id = request.prepend_end_of_text, served.tokenizer.eot_id
        if prepend and eot_id is None:
            raise invalid("prepend_end_of_text", "this tokenizer has no end-of-text token")
        self.check_room(served)
        ids = await parse_prompt(request.prompt, served.limits, room=int(prepend))
        size = served.limits.response_bytes(1, len(ids), request.top_logprobs)
        if size > RESPONSE_BYTES:
            raise too_large("top_logprobs", size, RESPONSE_BYTES)
        if eot_id is not None and prepend:
            ids = np.concatenate((np.array([eot_id]), ids))
        who = caller.get()
        job = Scoring(
            ids, _ignore, deadline, who.id, salt, who.terms, priority, top=request.top_logprobs
        )
        event = await self._scored(served, job)
        if expected and event.weights_version != expected:
            raise other_weights(expected, event.weights_version)
        response = await served.limits.heavy.run(
            len(ids) * (1 + request.top_logprobs),
            lambda: score_response(event, ids, served.tokenizer, prepend),
        )
        response.system_fingerprint = served.fingerprint(event.weights_version)
        return response

    async def _scored(self, served: Served, job: Scoring) -> Scored:
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

        def listen(event: Event) -> None:
            if not answer.done():
                answer.set_result(event)

        job.listener = listen
        try:
            served.engine.submit([job])
        except (*REFUSALS, EngineLost) as error:
            raise self.refused(error) from None
        try:
            event = await answer
        finally:
            served.engine.cancel([job])
        match event:
            case Scored():
                return event
            case Expired():
                raise expired()
            case Displaced():
                raise self.refused(QueueFull())
            case Lost():
                raise lost(event, event.began)
        raise internal()

    async def tokenize(self, request: api.TokenizeRequest) -> api.TokenizeResponse:
        """Token ids of a text, and their bytes.

        Raises:
            StatusError: the text is too long, or has a character that the tokenizer cannot encode.
        """
        served = self.accept(request.model)
        if len(request.text) > MAX_TEXT:
            raise invalid("text", f"has more than {MAX_TEXT} characters")
        with self:
            ids = await tokenize(request.text, served.limits, "text")
            return await served.limits.heavy.run(
                len(ids),
                lambda: api.TokenizeResponse(
                    token_ids=ids,
                    tokens=map(served.tokenizer.token_bytes, ids),
                    system_fingerprint=served.fingerprint(served.weights_version),
                ),
            )

    async def detokenize(self, request: api.DetokenizeRequest) -> api.DetokenizeResponse:
        """Text of token ids.

        Raises:
            StatusError: there are too many ids, or one is not in the vocabulary.
        """
        served = self.accept(request.model)
        ids = request.token_ids
        if len(ids) > MAX_TEXT:
            raise invalid("token_ids", f"has more than {MAX_TEXT} ids")
        try:
            with self:
                text = await served.limits.heavy.run(len(ids), lambda: served.tokenizer.decode(ids))
        except UsageError as error:
            raise invalid("token_ids", str(error)) from None
        return api.DetokenizeResponse(
            text=text, system_fingerprint=served.fingerprint(served.weights_version)
        )


def _ignore(event: Event) -> None:
    """The listener of a job that nobody waits for yet."""
