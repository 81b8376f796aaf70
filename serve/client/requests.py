"""Requests from keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt_dist.v1 import generation_pb2 as pb
from gpt_dist.v1 import generation_service_pb2 as api

Prompt = str | Sequence[int]
"""Text or token ids."""

_PARTS: dict[str, Any] = {
    "sampling": pb.SamplingParams,
    "stopping": pb.StoppingCriteria,
    "output": pb.OutputOptions,
}
FIELDS = {
    field.name: part for part, message in _PARTS.items() for field in message.DESCRIPTOR.fields
}
"""Keyword → part of the request."""


def fill_prompt(message: pb.Prompt, prompt: Prompt) -> None:
    """Set a Prompt to a text or to token ids."""
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)


def build_request(prompt: Prompt, **parameters: Any) -> api.GenerateRequest:
    """Build a request. Keywords are the fields of SamplingParams, StoppingCriteria, OutputOptions.

    ``time_budget`` is in seconds.

    Raises:
        TypeError: a keyword is unknown, or a value has the wrong type.
        ValueError: a field cannot hold its value.
    """
    request = api.GenerateRequest()
    fill_prompt(request.prompt, prompt)
    for name, value in parameters.items():
        if name not in FIELDS:
            raise TypeError(f"unknown parameter {name!r}; valid are {', '.join(sorted(FIELDS))}")
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
    """Convert a request for GenerateStream."""
    return api.GenerateStreamRequest.FromString(request.SerializeToString())


def batch(prompts: Iterable[Prompt], **parameters: Any) -> api.GenerateBatchRequest:
    """Build one request for many prompts with the same parameters."""
    requests = [build_request(prompt, **parameters) for prompt in prompts]
    return api.GenerateBatchRequest(requests=requests)


def score_request(prompt: Prompt, **parameters: Any) -> api.ScoreRequest:
    """Build a request for Score. Keywords are its fields."""
    request = api.ScoreRequest(**parameters)
    fill_prompt(request.prompt, prompt)
    return request
