"""The methods of ``gpt_dist.v1``: GenerationService and ModelService."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1 import model_service_pb2 as model_api
from serve.api.batch import Batch
from serve.api.rpc import note, seconds_left
from serve.api.serving import Serving
from serve.api.status import StatusError


class GenerationService:
    """Implements ``proto/gpt_dist/v1/generation_service.proto``."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def Generate(self, request: api.GenerateRequest, context: Any) -> api.GenerateResponse:
        served = self.serving.accept(request.model)
        async with self.serving.generation(served, request, seconds_left(context)) as call:
            try:
                return await call.finished()
            finally:
                note(**call.notes())

    async def GenerateStream(
        self, request: api.GenerateStreamRequest, context: Any
    ) -> AsyncGenerator[api.GenerateStreamResponse, None]:
        served = self.serving.accept(request.model)
        left = seconds_left(context)
        async with self.serving.generation(served, request, left, whole=False) as call:
            try:
                async for message in call.messages(self.serving.stream_interval):
                    yield message
            finally:
                note(**call.notes())

    async def GenerateBatch(
        self, requests: AsyncIterator[api.GenerateBatchRequest], context: Any
    ) -> AsyncGenerator[api.GenerateBatchResponse, None]:
        served, seconds = self.serving.accept(), seconds_left(context)
        tokens = {"prompt_tokens": 0, "completion_tokens": 0}

        async def generate(message: api.GenerateBatchRequest) -> api.GenerateResponse:
            async with self.serving.part(served, message.request, seconds) as call:
                return await call.finished()

        # Twice the slots, so that the engine's queue has work when a slot becomes free.
        batch = Batch(generate, 2 * served.limits.max_slots)
        try:
            with self.serving:
                async with aclosing(batch.answers(requests)) as answers:
                    async for index, answer in answers:
                        item = api.GenerateBatchResponse(request_index=index)
                        if isinstance(answer, StatusError):
                            item.error.CopyFrom(answer.status())
                        else:
                            item.response.CopyFrom(answer)
                            for name in tokens:
                                tokens[name] += getattr(answer.usage, name)
                        yield item
        finally:
            note(requests=batch.requests, **tokens)

    async def Score(self, request: api.ScoreRequest, context: Any) -> api.ScoreResponse:
        response = await self.serving.score(request, seconds_left(context))
        note(prompt_tokens=response.usage.prompt_tokens)
        return response

    async def Tokenize(self, request: api.TokenizeRequest, context: Any) -> api.TokenizeResponse:
        return await self.serving.tokenize(request)

    async def Detokenize(
        self, request: api.DetokenizeRequest, context: Any
    ) -> api.DetokenizeResponse:
        return await self.serving.detokenize(request)


class ModelService:
    """Implements ``proto/gpt_dist/v1/model_service.proto``."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def GetModelInfo(
        self, request: model_api.GetModelInfoRequest, context: Any
    ) -> model_api.GetModelInfoResponse:
        served = self.serving.accept(request.model)
        version = served.weights_version
        return model_api.GetModelInfoResponse(
            **served.facts,
            weights_version=version,
            system_fingerprint=served.fingerprint(version),
        )

    async def GetServerStatus(
        self, request: model_api.GetServerStatusRequest, context: Any
    ) -> model_api.GetServerStatusResponse:
        served = self.serving.accept(request.model)
        scheduler = served.engine.scheduler
        return model_api.GetServerStatusResponse(
            running=len(scheduler.slots.running),
            waiting=scheduler.jobs.waiting,
            max_slots=served.limits.max_slots,
            max_queue=scheduler.max_queue,
            system_fingerprint=served.fingerprint(served.weights_version),
        )
