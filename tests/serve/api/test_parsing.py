"""Invalid requests: the status names the field."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from serve.client import Client
from tests.serve.api.conftest import details
from tests.serve.conftest import CONTEXT, VOCABULARY, LiveServer

INVALID: list[tuple[str, dict[str, Any]]] = [
    ("config.sampling.temperature", {"temperature": -0.1}),
    ("config.sampling.temperature", {"temperature": float("nan")}),
    ("config.sampling.top_p", {"top_p": 0}),
    ("config.sampling.top_p", {"top_p": 1.1}),
    ("config.sampling.min_p", {"min_p": 2}),
    ("config.sampling.repetition_penalty", {"repetition_penalty": 0}),
    ("config.sampling.presence_penalty", {"presence_penalty": float("inf")}),
    ("config.sampling.frequency_penalty", {"frequency_penalty": -101}),
    ("config.sampling.logit_bias", {"logit_bias": {VOCABULARY: 1}}),
    ("config.sampling.logit_bias", {"logit_bias": {1: float("nan")}}),
    ("config.sampling.logit_bias", {"logit_bias": dict.fromkeys(range(1025), 1)}),
    ("config.sampling.n", {"n": 0}),
    ("config.sampling.n", {"n": 65}),
    ("config.stopping.max_new_tokens", {"max_new_tokens": 0}),
    ("config.stopping.min_new_tokens", {"max_new_tokens": 3, "min_new_tokens": 4}),
    ("config.stopping.stop_sequences[1]", {"stop_sequences": ["a", ""]}),
    ("config.stopping.stop_sequences", {"stop_sequences": ["a"] * 17}),
    ("config.stopping.stop_token_ids", {"stop_token_ids": [VOCABULARY]}),
    ("config.stopping.time_budget", {"time_budget": -1}),
    ("config.output.top_logprobs", {"top_logprobs": 3}),
    ("config.output.top_logprobs", {"logprobs": True, "top_logprobs": 21}),
]


@pytest.mark.parametrize(("field", "parameters"), INVALID)
def test_errors_name_the_invalid_field(
    client: Client, field: str, parameters: dict[str, Any]
) -> None:
    for call in (client.generate, lambda *a, **k: list(client.stream(*a, **k))):
        with pytest.raises(grpc.RpcError) as caught:
            call([1], **parameters)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        [violation] = details(caught.value)["BadRequest"].field_violations
        assert violation.field == field
        assert field in caught.value.details()


@pytest.mark.parametrize(
    ("field", "prompt"),
    [
        ("prompt.token_ids", []),
        ("prompt.token_ids", [VOCABULARY]),
        ("prompt.token_ids", [1] * (CONTEXT + 1)),
        ("prompt.text", "word " * 500),
        ("prompt.text", "x" * 100_000),
    ],
)
def test_invalid_prompts(client: Client, field: str, prompt: Any) -> None:
    for call in (client.generate, client.score):
        with pytest.raises(grpc.RpcError) as caught:
            call(prompt)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        [violation] = details(caught.value)["BadRequest"].field_violations
        assert violation.field == field


def test_a_request_without_prompt(server: LiveServer) -> None:
    channel = grpc.insecure_channel(server.target)
    call = channel.unary_unary("/gpt_dist.v1.GenerationService/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert details(caught.value)["BadRequest"].field_violations[0].field == "prompt"


def test_long_messages_are_refused(server: LiveServer, client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.tokenize("x" * (5 << 20))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.health()
