"""Single requests that `serve.bench` makes and measures, over gRPC or HTTP."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from serve.client import AsyncClient, Prompt


@dataclass
class Record:
    """What the client measured for one request. Times are in seconds."""

    tokens: int = 0
    first: float = math.nan
    """Time to the first token."""
    gaps: list[float] = field(default_factory=list)
    """Times between tokens. Tokens of one message share its gap equally."""
    total: float = math.nan
    error: str = ""


async def ask(
    client: AsyncClient,
    prompt: Prompt,
    new_tokens: int,
    parameters: dict[str, Any],
    clock: Callable[[], float] = time.perf_counter,
) -> Record:
    """Make one streamed request; returns its times, in seconds of ``clock``."""
    record = Record()
    began = last = clock()
    try:
        async for piece in client.stream(
            prompt, max_new_tokens=new_tokens, ignore_eos=True, **parameters
        ):
            now, count = clock(), len(piece.token_ids)
            if count and not record.tokens:
                record.first = now - began
                record.gaps += [0.0] * (count - 1)
            elif count:
                record.gaps += [(now - last) / count] * count
            record.tokens += count
            last = now if count else last
        record.total = clock() - began
    except grpc.aio.AioRpcError as error:
        record.error = error.code().name
    return record


class HttpClient:
    """Asks a server that speaks OpenAI's completions, ours or another.

    Args:
        url: up to and including ``/v1``.
        model: name of the model.
        token: bearer token.
        tls_ca: certificate authorities to trust (PEM).
        timeout: seconds until a request is given up.
    """

    def __init__(
        self, url: str, model: str, token: str | None, tls_ca: str | None, timeout: float
    ) -> None:
        import httpx

        self.model = model
        headers = {"authorization": f"Bearer {token}"} if token else {}
        verify: Any = tls_ca or True
        if tls_ca:
            import ssl

            verify = ssl.create_default_context(cafile=tls_ca)
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, verify=verify, timeout=timeout,
            limits=httpx.Limits(max_connections=None),
        )  # fmt: skip

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(
        self,
        prompt: Prompt,
        new_tokens: int,
        parameters: dict[str, Any],
        clock: Callable[[], float] = time.perf_counter,
    ) -> Record:
        """Make one streamed request; returns its times, in seconds of ``clock``.

        A chunk does not say how many tokens it has. So the times between tokens are the mean of the
        request, from its first chunk to its last.
        """
        import httpx

        body = {
            "model": self.model, "prompt": prompt, "max_tokens": new_tokens, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}, **parameters,
        }  # fmt: skip
        record = Record()
        began = last = clock()
        try:
            async with self._client.stream("POST", "/completions", json=body) as answer:
                if answer.status_code != 200:
                    record.error = str(answer.status_code)
                    return record
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        record.error = event["error"]["code"]
                        return record
                    if event.get("choices"):
                        last = clock()
                        if math.isnan(record.first):
                            record.first = last - began
                    if event.get("usage"):
                        record.tokens = event["usage"]["completion_tokens"]
            record.total = clock() - began
            if record.tokens > 1:
                gap = (last - began - record.first) / (record.tokens - 1)
                record.gaps = [gap] * (record.tokens - 1)
        except httpx.HTTPError as error:
            record.error = type(error).__name__
        return record
