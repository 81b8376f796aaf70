"""The blocking client."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.client import requests
from serve.client.requests import DEFAULT_TARGET, DEFAULT_TIMEOUT, Prompt


class Client:
    """A connection, reused by all calls and threads. Calls raise ``grpc.RpcError``.

    Args:
        target: ``host:port``, or ``dns:///name:port`` for all addresses of a name in turn.
        timeout: deadline of each call, in seconds; every method takes another one.
        token: bearer token; by default the environment's GPT_DIST_TOKEN.
        tls: encrypt, trusting the system's authorities.
        tls_ca: trust these authorities instead (PEM); implies ``tls``.
        tls_cert: certificate of this client (PEM), with ``tls_key``.
        request_id: sent with every call, for the server's log.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        token: str | None = None,
        tls: bool = False,
        tls_ca: Path | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        request_id: str | None = None,
    ) -> None:
        self.timeout = timeout
        self.metadata = requests.metadata(token, request_id)
        secrets = requests.credentials(tls, tls_ca, tls_cert, tls_key)
        options = requests.CHANNEL_OPTIONS
        self._channel = (
            grpc.insecure_channel(target, options)
            if secrets is None
            else grpc.secure_channel(target, secrets, options)
        )
        self._stub: Any = GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()

    def _with(self, timeout: float | None) -> dict[str, Any]:
        return {"timeout": timeout or self.timeout, "metadata": self.metadata}

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **parameters: Any
    ) -> api.GenerateResponse:
        """Continue a prompt; keywords as in `build_request`."""
        request = requests.build_request(prompt, **parameters)
        response: api.GenerateResponse = self._stub.Generate(request, **self._with(timeout))
        return response

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **parameters: Any
    ) -> Generator[api.GenerateStreamResponse, None, None]:
        """Continue a prompt, piece by piece. Closing the iterator cancels on the server."""
        request = requests.as_stream(requests.build_request(prompt, **parameters))
        yield from _closing(self._stub.GenerateStream(request, **self._with(timeout)))

    def batch(
        self, prompts: Iterable[Prompt], *, timeout: float | None = None, **parameters: Any
    ) -> Generator[api.GenerateBatchResponse, None, None]:
        """Continue many prompts, in the order in which they are finished."""
        request = requests.batch(prompts, **parameters)
        yield from _closing(self._stub.GenerateBatch(request, **self._with(timeout)))

    def score(
        self, prompt: Prompt, *, timeout: float | None = None, **parameters: Any
    ) -> api.ScoreResponse:
        """Log-probabilities of a text; keywords are the fields of ScoreRequest."""
        request = requests.score_request(prompt, **parameters)
        response: api.ScoreResponse = self._stub.Score(request, **self._with(timeout))
        return response

    def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """Token ids of a text."""
        response = self._stub.Tokenize(api.TokenizeRequest(text=text), **self._with(timeout))
        return list(response.token_ids)

    def detokenize(self, token_ids: Iterable[int], *, timeout: float | None = None) -> str:
        """Text of token ids."""
        request = api.DetokenizeRequest(token_ids=token_ids)
        text: str = self._stub.Detokenize(request, **self._with(timeout)).text
        return text

    def info(self, *, timeout: float | None = None) -> api.GetModelInfoResponse:
        """What is being served."""
        request = api.GetModelInfoRequest()
        response: api.GetModelInfoResponse = self._stub.GetModelInfo(request, **self._with(timeout))
        return response

    def health(self, *, timeout: float | None = None) -> bool:
        """Whether the server takes requests; also False if it cannot be reached."""
        request = health_pb2.HealthCheckRequest()
        try:
            status = self._health.Check(request, **self._with(timeout)).status
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        return bool(status == health_pb2.HealthCheckResponse.SERVING)


def _closing(call: Any) -> Generator[Any, None, None]:
    try:
        yield from call
    finally:
        call.cancel()
