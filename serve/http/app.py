"""The endpoints."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from grpc import StatusCode
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.gate import Gate
from serve.api.rpc import UNKNOWN, note
from serve.api.served import Served
from serve.api.serving import Serving
from serve.api.status import StatusError
from serve.health import Health
from serve.http import schema
from serve.http.completions import Completion
from serve.http.frame import Behaviour, Events, Reply, answer
from serve.http.logprobs import token_text
from serve.http.openapi import openapi

PARSED = 16
"""So many bytes of JSON are as much work as one character to tokenise."""

Body = TypeVar("Body", bound=schema.AnyBody)


class App:
    """The ASGI application.

    Args:
        serving: answers.
        gate: admits.
        health: what /health tells.
    """

    def __init__(self, serving: Serving, gate: Gate, health: Health) -> None:
        self.serving, self.gate, self.health = serving, gate, health
        self._began = int(time.time())
        self.endpoints: dict[str, dict[str, Behaviour]] = {
            "/v1/completions": {"POST": self.completions},
            "/v1/models": {"GET": self.models},
            "/tokenize": {"POST": self.tokenize},
            "/detokenize": {"POST": self.detokenize},
            "/health": {"GET": self.healthy, "HEAD": self.healthy},
            "/metrics": {"GET": self.metrics},
            "/openapi.json": {"GET": self.openapi},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        name, behaviour = self._find(scope["path"], scope["method"])
        await answer(name, behaviour, self.gate, scope, receive, send)

    def _find(self, path: str, method: str) -> tuple[str, Behaviour]:
        found: dict[str, Behaviour]
        if path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")

            async def model(_: bytes) -> Reply:
                return await self.model(name)

            path, found = "/v1/models/{model}", {"GET": model}
        else:
            found = self.endpoints.get(path, {})
        if method in found:
            return f"{method} {path}", found[method]

        async def refuse(_: bytes) -> Reply:
            note(called=f"{method} {path}"[:200])
            if path == "/v1/chat/completions":
                reason = "this is a base model without a chat template; use /v1/completions"
            elif found:
                reason = f"{path} takes {' and '.join(found)}"
            else:
                reason = f"no such path; there are {', '.join(self.endpoints)}"
            raise StatusError(StatusCode.UNIMPLEMENTED, reason, "UNKNOWN_METHOD")

        return UNKNOWN, refuse

    async def completions(self, data: bytes) -> Reply | Events:
        served = self.serving.accept()
        self.serving.check_room(served)
        body = await _parse(served, data, schema.CompletionRequest)
        completion = Completion(self.serving, body)
        if body.stream:
            return completion.events()
        return Reply(await completion.whole())

    async def models(self, _: bytes) -> Reply:
        return Reply.json({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Reply:
        self.serving.accept(name)
        return Reply.json(self._model())

    def _model(self) -> dict[str, Any]:
        served = self.serving.accept()
        return {
            "id": served.name,
            "object": "model",
            "created": self._began,
            "owned_by": "gpt_dist",
            "max_model_len": served.limits.max_context,
            "system_fingerprint": served.fingerprint(served.weights_version),
        }

    async def tokenize(self, data: bytes) -> Reply:
        served = self.serving.accept()
        body = await _parse(served, data, schema.TokenizeRequest)
        request = api.TokenizeRequest(text=body.prompt, model=body.model)
        made = await self.serving.tokenize(request)

        def reply() -> Reply:
            return Reply.json(
                {
                    "count": len(made.token_ids),
                    "max_model_len": served.limits.max_context,
                    "tokens": list(made.token_ids),
                    "token_strs": [token_text(token) for token in made.tokens],
                    "system_fingerprint": made.system_fingerprint,
                }
            )

        return await served.limits.heavy.run(len(made.token_ids), reply)

    async def detokenize(self, data: bytes) -> Reply:
        served = self.serving.accept()
        body = await _parse(served, data, schema.DetokenizeRequest)
        request = api.DetokenizeRequest(token_ids=body.tokens, model=body.model)
        made = await self.serving.detokenize(request)
        return Reply.json({"prompt": made.text, "system_fingerprint": made.system_fingerprint})

    async def healthy(self, _: bytes) -> Reply:
        serving = self.health.serving
        return Reply.json(
            {"status": "SERVING" if serving else "NOT_SERVING"}, 200 if serving else 503
        )

    async def metrics(self, _: bytes) -> Reply:
        content = generate_latest(self.serving.metrics.registry)
        return Reply(content, kind=CONTENT_TYPE_PLAIN_0_0_4)

    async def openapi(self, _: bytes) -> Reply:
        return Reply.json(openapi())


async def _parse(served: Served, data: bytes, kind: type[Body]) -> Body:
    return await served.limits.heavy.run(len(data) // PARSED, lambda: schema.parse(data, kind))


def application(app: App, origins: tuple[str, ...]) -> ASGIApp:
    """The application, open to web pages of these origins."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=["x-request-id", "retry-after"],
    )
