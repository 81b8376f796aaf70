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
