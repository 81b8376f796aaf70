"""Requests from keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
"""Keyword → part of GenerationConfig."""
OWN = ("model", "expected_weights_version", "cache_salt", "priority")
"""Keywords that are fields of the request itself."""
CONFIG = ("truncate_prompt_tokens",)
"""Keywords that are fields of GenerationConfig itself."""


def fill_prompt(message: pb.Prompt, prompt: Prompt) -> None:
    """Set a Prompt to a text or to token ids."""
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)


def build_request(prompt: Prompt, **parameters: Any) -> api.GenerateRequest:
    """Build a request for Generate.

    Keywords are the fields of SamplingParams, StoppingCriteria and OutputOptions, and ``model``,
    ``expected_weights_version``, ``cache_salt``, ``priority`` and ``truncate_prompt_tokens``.
    ``time_budget`` is in seconds.

    Raises:
        TypeError: a keyword is unknown, or a value has the wrong type.
        ValueError: a field cannot hold its value.
    """
    request = api.GenerateRequest()
    _fill(request, prompt, parameters)
    return request


def stream_request(prompt: Prompt, **parameters: Any) -> api.GenerateStreamRequest:
    """Build a request for GenerateStream; keywords as in `build_request`."""
    request = api.GenerateStreamRequest()
    _fill(request, prompt, parameters)
    return request


def _fill(request: Any, prompt: Prompt, parameters: dict[str, Any]) -> None:
    fill_prompt(request.prompt, prompt)
    for name, value in parameters.items():
        if name in OWN:
            part = request
        elif name in CONFIG:
            part = request.config
        elif name in FIELDS:
            part = getattr(request.config, FIELDS[name])
        else:
            valid = ", ".join(sorted((*FIELDS, *OWN, *CONFIG)))
            raise TypeError(f"unknown parameter {name!r}; valid are {valid}")
        if value is None:
            continue
        if name == "time_budget":
            part.time_budget.FromNanoseconds(int(value * 1e9))
        elif isinstance(value, Mapping):
            getattr(part, name).update(value)
        elif isinstance(value, str) or not isinstance(value, Iterable):
            setattr(part, name, value)
        else:
            getattr(part, name).extend(value)


class Batch:
    """The requests for many prompts with the same parameters, made as the server reads them.

    Raises:
        TypeError: as in `build_request`, before the first request.
        ValueError: likewise.
    """

    def __init__(self, prompts: Iterable[Prompt], **parameters: Any) -> None:
        self._prompts = prompts
        self._base = build_request("", **parameters)
        self.error: Exception | None = None
        """Why the iteration ended early: grpc hides what an iterator raises."""

    def __iter__(self) -> Iterator[api.GenerateBatchRequest]:
        try:
            for prompt in self._prompts:
                made = api.GenerateBatchRequest(request=self._base)
                made.request.prompt.Clear()
                fill_prompt(made.request.prompt, prompt)
                yield made
        except Exception as error:
            self.error = error
            raise


def score_request(prompt: Prompt, **parameters: Any) -> api.ScoreRequest:
    """Build a request for Score. Keywords are its fields."""
    request = api.ScoreRequest(**parameters)
    fill_prompt(request.prompt, prompt)
    return request
