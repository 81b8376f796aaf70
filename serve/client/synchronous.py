"""The blocking client."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1 import model_service_pb2 as model_api
from serve.client import requests
from serve.client.connection import Connection
from serve.client.requests import Prompt


class Client(Connection):
    """The blocking client, for all calls and threads; arguments as in `Connection`."""

    _channels = grpc

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
        """Close the connection. Calls in progress are cancelled."""
        self._channel.close()
        self._health_channel.close()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **parameters: Any
    ) -> api.GenerateResponse:
        """Continue a prompt. `build_request` lists the keywords."""
        request = requests.build_request(prompt, **self._named(parameters))
        response: api.GenerateResponse = self._stub.Generate(request, **self._with(timeout))
        return response

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **parameters: Any
    ) -> Generator[api.GenerateStreamResponse, None, None]:
        """Continue a prompt and yield text as it arrives. Closing the iterator cancels the call."""
        request = requests.stream_request(prompt, **self._named(parameters))
        yield from _closing(self._stub.GenerateStream(request, **self._with(timeout)))

    def batch(
        self, prompts: Iterable[Prompt], *, timeout: float | None = None, **parameters: Any
    ) -> Generator[api.GenerateBatchResponse, None, None]:
        """Continue many prompts, and yield each result when it is ready, in any order."""
        batch = requests.Batch(prompts, **self._named(parameters))
        try:
            yield from _closing(self._stub.GenerateBatch(iter(batch), **self._with(timeout)))
        except grpc.RpcError:
            if batch.error is not None:
                raise batch.error from None
            raise

    def score(
        self, prompt: Prompt, *, timeout: float | None = None, **parameters: Any
    ) -> api.ScoreResponse:
        """Log-probabilities of a text. Keywords are the fields of ScoreRequest."""
        request = requests.score_request(prompt, **self._named(parameters))
        response: api.ScoreResponse = self._stub.Score(request, **self._with(timeout))
        return response

    def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """Token ids of a text."""
        response = self._stub.Tokenize(
            api.TokenizeRequest(text=text, model=self.model), **self._with(timeout)
        )
        return list(response.token_ids)

    def detokenize(self, token_ids: Iterable[int], *, timeout: float | None = None) -> str:
        """Text of token ids."""
        request = api.DetokenizeRequest(token_ids=token_ids, model=self.model)
        text: str = self._stub.Detokenize(request, **self._with(timeout)).text
        return text

    def info(self, *, timeout: float | None = None) -> model_api.GetModelInfoResponse:
        """Describe the served model."""
        request = model_api.GetModelInfoRequest(model=self.model)
        call = self._model_stub.GetModelInfo(request, **self._with(timeout))
        response: model_api.GetModelInfoResponse = call
        return response

    def status(self, *, timeout: float | None = None) -> model_api.GetServerStatusResponse:
        """Tell how busy the server is."""
        request = model_api.GetServerStatusRequest(model=self.model)
        call = self._model_stub.GetServerStatus(request, **self._with(timeout))
        response: model_api.GetServerStatusResponse = call
        return response

    def health(self, *, timeout: float | None = None, reachable: bool = False) -> bool:
        """Whether the server accepts requests.

        One that cannot be reached does not, unless it must be ``reachable``: then the call raises.
        """
        request = health_pb2.HealthCheckRequest()
        try:
            status = self._health.Check(request, **self._with(timeout)).status
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE and not reachable:
                return False
            raise
        return bool(status == health_pb2.HealthCheckResponse.SERVING)


def _closing(call: Any) -> Generator[Any, None, None]:
    try:
        yield from call
    finally:
        call.cancel()
