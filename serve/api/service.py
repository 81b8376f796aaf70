"""The methods of ``gpt_dist.v1.GenerationService``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from gpt_dist.errors import UsageError
from gpt_dist.text.tokenizers import Tokenizer
from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.generation import Call
from serve.api.logprobs import score_response
from serve.api.parsing import MAX_TOP_LOGPROBS, Generation, Limits, parse_generation, parse_prompt
from serve.api.parsing import tokenize as encode
from serve.api.rpc import deadline_of, note
from serve.api.status import StatusError, expired, internal, invalid, lost, overloaded, unavailable
from serve.engine.engine import Engine, EngineLost
from serve.engine.jobs import Event, Expired, Finish, Lost, QueueFull, Scored, Scoring
from serve.engine.loading import Loaded
from serve.metrics import Metrics

MAX_BATCH = 4096


@dataclass(frozen=True)
class Served:
    """A model that is ready to serve."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    limits: Limits
    facts: dict[str, Any]
    """The constant fields of GetModelInfoResponse."""


def describe_model(loaded: Loaded, engine: Engine, name: str) -> Served:
    """Collect what calls need to know about a model."""
    decoder, tokenizer = loaded.decoder, loaded.tokenizer
    try:
        server_version = version("gpt_dist")
    except PackageNotFoundError:  # run from a checkout
        server_version = "0"
    facts = {
        **loaded.shape,
        "name": name,
        "parameters": loaded.parameters,
        "max_context": decoder.max_context,
        "vocab_size": decoder.vocab_size,
        "tokenizer": tokenizer.name,
        "device": decoder.device.type,
        "dtype": decoder.dtype,
        "backend": decoder.backend,
        "max_slots": decoder.max_slots,
        "max_queue": engine.scheduler.max_queue,
        "deterministic": decoder.deterministic,
        "server_version": server_version,
    }
    if tokenizer.eot_id is not None:
        facts["end_of_text_id"] = tokenizer.eot_id
    limits = Limits(
        tokenizer=tokenizer,
        vocab_size=decoder.vocab_size,
        max_context=decoder.max_context,
        max_outputs=engine.scheduler.capacity,
        longest_token=max(1, int(tokenizer.byte_lengths.max())),
    )
    return Served(name, engine, tokenizer, limits, facts)


class GenerationService:
    """Implements ``proto/gpt_dist/v1/generation_service.proto``.

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
        """Calls that were accepted and have not ended."""
        self.idle = asyncio.Event()
        self.idle.set()

    def accept(self) -> Served:
        """Return the model, if the server accepts new work.

        Raises:
            StatusError: UNAVAILABLE.
        """
        if self.draining:
            raise unavailable("the server is shutting down", "DRAINING")
        if self.served is None:
            raise unavailable("the model is loading", "LOADING")
        if self.served.engine.failure is not None:
            raise unavailable("the engine failed", "ENGINE_FAILED")
        return self.served

    def __enter__(self) -> GenerationService:
        self.open_calls += 1
        self.idle.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.open_calls -= 1
        if not self.open_calls:
            self.idle.set()

    def refused(self, error: QueueFull | EngineLost) -> StatusError:
        """The status for a job that the engine refused."""
        if isinstance(error, EngineLost) or self.served is None:
            return unavailable("the engine failed", "ENGINE_FAILED")
        return overloaded(self.served.engine.scheduler.retry_after)

    def _call(self, served: Served, wanted: Generation, context: Any) -> Call:
        deadline = deadline_of(context, served.engine.clock)
        return Call(wanted, served.engine, served.tokenizer, self.metrics, deadline)

    async def _generate(self, served: Served, request: Any, context: Any) -> api.GenerateResponse:
        wanted = await parse_generation(request, served.limits)
        try:
            with self._call(served, wanted, context) as call:
                return await call.finished()
        except (QueueFull, EngineLost) as error:
            raise self.refused(error) from None

    # --- the API --------------------------------------------------------------------------------

    async def Generate(self, request: api.GenerateRequest, context: Any) -> api.GenerateResponse:
        served = self.accept()
        with self:
            response = await self._generate(served, request, context)
        note(
            prompt_tokens=response.usage.prompt_tokens,
            completion_tokens=response.usage.completion_tokens,
            ended=endings(output.finish_reason for output in response.outputs),
        )
        return response

    async def GenerateStream(
        self, request: api.GenerateStreamRequest, context: Any
    ) -> AsyncGenerator[api.GenerateStreamResponse, None]:
        served = self.accept()
        with self:
            wanted = await parse_generation(request, served.limits)
            note(prompt_tokens=len(wanted.ids))
            try:
                with self._call(served, wanted, context) as call:
                    async for message in call.messages(self.stream_interval):
                        yield message
            except (QueueFull, EngineLost) as error:
                raise self.refused(error) from None
            note(
                completion_tokens=sum(output.tokens for output in call.outputs),
                ended=endings(output.finish or 0 for output in call.outputs),
            )

    async def GenerateBatch(
        self, request: api.GenerateBatchRequest, context: Any
    ) -> AsyncIterator[api.GenerateBatchResponse]:
        served = self.accept()
        count = len(request.requests)
        if not 1 <= count <= MAX_BATCH:
            raise invalid("requests", f"has {count} entries; valid are 1 to {MAX_BATCH}")
        note(requests=count)
        waiting, answered = list(range(count))[::-1], 0
        running: dict[asyncio.Task[api.GenerateResponse], int] = {}
        # Twice the slots, so that the engine's queue has work when a slot becomes free.
        most = window = 2 * served.engine.scheduler.decoder.max_slots
        with self:
            try:
                while waiting or running:
                    while waiting and len(running) < window:
                        index = waiting.pop()
                        work = self._generate(served, request.requests[index], context)
                        running[asyncio.create_task(work)] = index
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        index = running.pop(task)
                        error = task.exception()
                        if error is None:
                            item = api.GenerateBatchResponse(
                                request_index=index, response=task.result()
                            )
                        elif not isinstance(error, StatusError):
                            raise error
                        elif error.reason == "QUEUE_FULL":  # other calls fill the queue
                            waiting.append(index)
                            window = max(1, len(running))
                            if not running:
                                if not answered:
                                    raise error
                                await asyncio.sleep(error.retry_after or 0)
                            continue
                        else:
                            item = _item_error(index, error)
                        answered, window = answered + 1, min(window + 1, most)
                        yield item
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def Score(self, request: api.ScoreRequest, context: Any) -> api.ScoreResponse:
        served = self.accept()
        if request.top_logprobs > MAX_TOP_LOGPROBS:
            raise invalid("top_logprobs", f"exceeds {MAX_TOP_LOGPROBS}")
        prepend = request.prepend_end_of_text
        eot_id = served.tokenizer.eot_id
        if prepend and eot_id is None:
            raise invalid("prepend_end_of_text", "this tokenizer has no end-of-text token")
        with self:
            ids = await parse_prompt(request.prompt, served.limits, room=int(prepend))
            if eot_id is not None and prepend:
                ids = np.concatenate((np.array([eot_id]), ids))
            answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

            def listen(event: Event) -> None:
                if not answer.done():
                    answer.set_result(event)

            deadline = deadline_of(context, served.engine.clock)
            job = Scoring(ids, listen, deadline, top=request.top_logprobs)
            try:
                served.engine.submit([job])
            except (QueueFull, EngineLost) as error:
                raise self.refused(error) from None
            try:
                event = await answer
            finally:
                served.engine.cancel([job])
        match event:
            case Scored():
                note(prompt_tokens=len(ids))
                return score_response(event, ids, served.tokenizer, prepend)
            case Expired():
                raise expired()
            case Lost():
                raise lost(event.message, event.began)
        raise internal()

    async def Tokenize(self, request: api.TokenizeRequest, context: Any) -> api.TokenizeResponse:
        tokenizer = self.accept().tokenizer
        ids = await encode(request.text, tokenizer, "text")
        return api.TokenizeResponse(token_ids=ids, tokens=map(tokenizer.token_bytes, ids))

    async def Detokenize(
        self, request: api.DetokenizeRequest, context: Any
    ) -> api.DetokenizeResponse:
        tokenizer = self.accept().tokenizer
        try:
            return api.DetokenizeResponse(text=tokenizer.decode(request.token_ids))
        except UsageError as error:
            raise invalid("token_ids", str(error)) from None

    async def GetModelInfo(
        self, request: api.GetModelInfoRequest, context: Any
    ) -> api.GetModelInfoResponse:
        served = self.accept()
        scheduler = served.engine.scheduler
        return api.GetModelInfoResponse(
            **served.facts,
            weights_version=scheduler.weights_version,
            running=len(scheduler.running),
            waiting=scheduler.waiting,
        )


def endings(reasons: Iterable[int]) -> str:
    """Why outputs ended, for the log: ``context full, length``."""
    names = {Finish(reason).name.lower().replace("_", " ") for reason in reasons if reason}
    return ", ".join(sorted(names))


def _item_error(index: int, error: StatusError) -> api.GenerateBatchResponse:
    item = api.ItemError(code=error.number, message=error.message, field=error.field)
    return api.GenerateBatchResponse(request_index=index, error=item)
