"""``/v1/completions``: requests in, OpenAI's completions out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from gpt_dist.v1 import generation_pb2 as pb
from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.batch import Batch
from serve.api.parsing import parse_prompt
from serve.api.rpc import current, note
from serve.api.serving import Serving
from serve.api.status import StatusError, too_large
from serve.engine.jobs import Finish
from serve.http.frame import encode
from serve.http.logprobs import Offsets, logprobs
from serve.http.schema import CompletionRequest, check, generation_request, prompts

RESPONSE_BYTES = 64 << 20
"""Estimated size of the largest answer."""
AT_ONCE = 16
"""Pieces of a stream that wait for the caller, if it has several prompts."""
REASONS = {
    Finish.EOS: "stop",
    Finish.STOP_SEQUENCE: "stop",
    Finish.STOP_TOKEN: "stop",
}
"""OpenAI's reasons; all others are "length"."""


@dataclass
class Echo:
    """What precedes the continuations of one prompt."""

    text: str = ""
    tokens: list[pb.TokenLogprob] = field(default_factory=list)


class Completion:
    """One request.

    Args:
        serving: answers.
        body: the request.

    Raises:
        StatusError: the server does not accept work, or the request is invalid.
    """

    def __init__(self, serving: Serving, body: CompletionRequest) -> None:
        check(body)
        self.serving, self.body = serving, body
        self.served = serving.accept(body.model)
        self.prompts = prompts(body, self.served.limits)
        self.usage = pb.Usage()
        self.requests = [generation_request(body, prompt) for prompt in self.prompts]
        first = self.requests[0].config
        self.n = first.sampling.n if first.sampling.HasField("n") else 1
        tokens = min(first.stopping.max_new_tokens, self.served.limits.max_context)
        if body.echo:
            tokens += self.served.limits.max_context
        size = self.served.limits.response_bytes(self.n * len(self.prompts), tokens, body.logprobs)
        if size > RESPONSE_BYTES:
            raise too_large("prompt", size, RESPONSE_BYTES)
        self.fingerprint = self.served.fingerprint(self.served.weights_version)
        self._head = {
            "id": f"cmpl-{current.get().request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.served.name,
        }

    def _envelope(self, **values: Any) -> dict[str, Any]:
        return {**self._head, "system_fingerprint": self.fingerprint, **values}

    def _add(self, usage: pb.Usage) -> None:
        for descriptor, count in usage.ListFields():
            setattr(self.usage, descriptor.name, getattr(self.usage, descriptor.name) + count)

    def _note(self) -> None:
        note(prompt_tokens=self.usage.prompt_tokens, completion_tokens=self.usage.completion_tokens)
        if len(self.prompts) > 1:
            note(requests=len(self.prompts))
        if self.body.user:
            note(user=self.body.user[:64])

    async def whole(self) -> bytes:
        """The complete answer."""
        choices: dict[int, list[bytes]] = {}

        async def each() -> AsyncIterator[int]:
            for index in range(len(self.prompts)):
                yield index

        batch = Batch(self._choices, 2 * self.served.limits.max_slots)
        try:
            with self.serving:
                async with aclosing(batch.answers(each())) as answers:
                    async for index, answer in answers:
                        if isinstance(answer, StatusError):
                            raise answer
                        choices[index] = answer
        finally:
            self._note()
        ordered = [orjson.Fragment(part) for index in sorted(choices) for part in choices[index]]
        return encode(self._envelope(choices=ordered, usage=usage_object(self.usage)))

    async def _choices(self, index: int) -> list[bytes]:
        """The choices of one prompt."""
        request = self.requests[index]
        echo = await self._echo(index)
        if self.body.max_tokens == 0:
            assert echo is not None
            outputs = [pb.GenerationOutput(finish_reason=pb.FINISH_REASON_LENGTH)] * self.n
        else:
            async with self.serving.part(self.served, request, None) as call:
                response = await call.finished()
            outputs = list(response.outputs)
            self._add(response.usage)
            self.fingerprint = response.system_fingerprint
        found = []
        for place, output in enumerate(outputs):
            tokens = [*(echo.tokens if echo else ()), *output.logprobs]
            text = (echo.text if echo else "") + output.text

            def choice(
                place: int = place,
                tokens: list[pb.TokenLogprob] = tokens,
                text: str = text,
                output: pb.GenerationOutput = output,
            ) -> bytes:
                scores = self._logprobs(tokens, Offsets())
                return encode(choice_object(index * self.n + place, text, scores, output))

            size = len(tokens) * (1 + (self.body.logprobs or 0))
            found.append(await self.served.limits.heavy.run(size, choice))
        return found

    async def _echo(self, index: int) -> Echo | None:
        """The prompt as the caller sees it, scored if log-probabilities are wanted."""
        if not self.body.echo:
            return None
        request, prompt = self.requests[index], self.prompts[index]
        keep = self.body.truncate_prompt_tokens
        ids = await parse_prompt(request.prompt, self.served.limits, keep=keep)
        text = prompt if isinstance(prompt, str) and keep is None else None
        if text is None:
            text = self.served.tokenizer.decode(ids.tolist())
        request.prompt.token_ids.ids[:] = ids.tolist()
        echo = Echo(text)
        if self.body.logprobs is not None:
            wanted = api.ScoreRequest(
                prompt=request.prompt,
                top_logprobs=self.body.logprobs,
                expected_weights_version=request.expected_weights_version,
                cache_salt=request.cache_salt,
                priority=request.priority,
            )
            scored = await self.serving.score_part(self.served, wanted)
            echo.tokens = list(scored.tokens)
            self.fingerprint = scored.system_fingerprint
        if self.body.max_tokens == 0:
            self.usage.prompt_tokens += len(ids)
        return echo

    def _logprobs(self, tokens: list[pb.TokenLogprob], offsets: Offsets) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return logprobs(tokens, offsets, bool(self.body.logprobs))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        options = self.body.stream_options
        counted = bool(options and options.include_usage)
        extra: dict[str, Any] = {"usage": None} if counted else {}
        try:
            with self.serving:
                async with aclosing(self._pieces()) as pieces:
                    async for choice in pieces:
                        yield event(self._envelope(choices=[choice], **extra))
            if counted:
                yield event(self._envelope(choices=[], usage=usage_object(self.usage)))
            yield b"data: [DONE]\n\n"
        finally:
            self._note()

    async def _pieces(self) -> AsyncGenerator[dict[str, Any], None]:
        if len(self.prompts) == 1:
            async with aclosing(self._stream(0)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(AT_ONCE)
        places = asyncio.Semaphore(self.served.limits.max_slots)

        async def follow(index: int) -> None:
            async with places, aclosing(self._stream(index)) as pieces:
                async for piece in pieces:
                    await queue.put(piece)

        async def follow_all() -> None:
            tasks = [asyncio.create_task(follow(index)) for index in range(len(self.prompts))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await queue.put(None)

        following = asyncio.create_task(follow_all())
        try:
            while (item := await queue.get()) is not None:
                yield item
            await following
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _stream(self, index: int) -> AsyncGenerator[dict[str, Any], None]:
        """The pieces of the choices of one prompt."""
        first = index * self.n
        offsets = [Offsets() for _ in range(self.n)]
        echo = await self._echo(index)
        if echo is not None:
            for place in range(self.n):
                scored = self._logprobs(echo.tokens, offsets[place])
                done = pb.GenerationOutput(finish_reason=pb.FINISH_REASON_LENGTH)
                last = done if self.body.max_tokens == 0 else None
                yield choice_object(first + place, echo.text, scored, last)
            if self.body.max_tokens == 0:
                return
        request = self.requests[index]
        async with self.serving.part(self.served, request, None, whole=False) as call:
            async for message in call.messages(self.serving.stream_interval):
                if message.HasField("started"):
                    self.fingerprint = message.started.system_fingerprint
                end = message.finished if message.HasField("finished") else None
                if end is not None:
                    self._add(end.usage)
                elif not (message.text_delta or message.logprobs):
                    continue  # part of a character, or of what may be a stop sequence
                found = self._logprobs(list(message.logprobs), offsets[message.index])
                yield choice_object(first + message.index, message.text_delta, found, end)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


def choice_object(
    index: int,
    text: str,
    scores: dict[str, Any] | None,
    end: pb.GenerationOutput | api.GenerationFinished | None,
) -> dict[str, Any]:
    """OpenAI's choice, or a piece of one. ``end`` says why it ended, if it has."""
    reason = stop = None
    if end is not None:
        reason = REASONS.get(Finish(end.finish_reason), "length")
        kind = end.WhichOneof("stop")
        stop = getattr(end, kind) if kind else None
    return {
        "index": index, "text": text, "logprobs": scores, "finish_reason": reason,
        "stop_reason": stop,
    }  # fmt: skip


def usage_object(usage: pb.Usage) -> dict[str, Any]:
    """OpenAI's numbers of tokens."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.drafted_tokens - usage.accepted_tokens,
        },
    }
