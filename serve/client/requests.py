"""What both clients share: building requests, and the channel."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from gpt_dist.v1 import generation_pb2 as pb
from gpt_dist.v1 import generation_service_pb2 as api

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 120.0
MAX_RESPONSE_BYTES = 64 << 20

Prompt = str | Sequence[int]
"""Text or token ids."""

# UNAVAILABLE means that nothing was done (gRFC A6); all else is the caller's to decide.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "gpt_dist.v1.GenerationService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "loadBalancingConfig": [{"round_robin": {}}],
}

CHANNEL_OPTIONS = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

_PARTS: dict[str, Any] = {
    "sampling": pb.SamplingParams,
    "stopping": pb.StoppingCriteria,
    "output": pb.OutputOptions,
}
FIELDS = {
    field.name: part for part, message in _PARTS.items() for field in message.DESCRIPTOR.fields
}
"""Keyword → the part of a request that it is in."""


def fill_prompt(message: pb.Prompt, prompt: Prompt) -> None:
    """Put text or token ids into a Prompt."""
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)


def build_request(prompt: Prompt, **parameters: Any) -> api.GenerateRequest:
    """A request from keywords: the fields of SamplingParams, StoppingCriteria and OutputOptions.

    ``time_budget`` is in seconds.

    Raises:
        TypeError: an unknown keyword, or a value of the wrong type.
        ValueError: a value that the field cannot hold.
    """
    request = api.GenerateRequest()
    fill_prompt(request.prompt, prompt)
    for name, value in parameters.items():
        if name not in FIELDS:
            raise TypeError(f"unknown parameter {name!r}; known are {', '.join(sorted(FIELDS))}")
        if value is None:
            continue
        part = getattr(request, FIELDS[name])
        if name == "time_budget":
            part.time_budget.FromNanoseconds(int(value * 1e9))
        elif isinstance(value, Mapping):
            getattr(part, name).update(value)
        elif isinstance(value, str) or not isinstance(value, Iterable):
            setattr(part, name, value)
        else:
            getattr(part, name).extend(value)
    return request


def as_stream(request: api.GenerateRequest) -> api.GenerateStreamRequest:
    """The same request for GenerateStream."""
    return api.GenerateStreamRequest.FromString(request.SerializeToString())


def batch(prompts: Iterable[Prompt], **parameters: Any) -> api.GenerateBatchRequest:
    """One request for many prompts with the same parameters."""
    requests = [build_request(prompt, **parameters) for prompt in prompts]
    return api.GenerateBatchRequest(requests=requests)


def score_request(prompt: Prompt, **parameters: Any) -> api.ScoreRequest:
    """A request for Score; the keywords are its fields."""
    request = api.ScoreRequest(**parameters)
    fill_prompt(request.prompt, prompt)
    return request


def credentials(
    tls: bool, ca: Path | None, cert: Path | None, key: Path | None
) -> grpc.ChannelCredentials | None:
    """TLS credentials; None for a connection in the clear.

    Raises:
        OSError: a file cannot be read.
    """
    if not (tls or ca or cert):
        return None
    return grpc.ssl_channel_credentials(
        ca.read_bytes() if ca else None,
        key.read_bytes() if key else None,
        cert.read_bytes() if cert else None,
    )


def metadata(token: str | None, request_id: str | None) -> list[tuple[str, str]]:
    """Metadata of a call. The token defaults to the environment's GPT_DIST_TOKEN."""
    token = token or os.environ.get("GPT_DIST_TOKEN")
    made = [("authorization", f"Bearer {token}")] if token else []
    return [*made, ("x-request-id", request_id)] if request_id else made
