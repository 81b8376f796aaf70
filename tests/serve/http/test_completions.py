"""Completions by OpenAI's own client, compared with gRPC and with the model."""

from __future__ import annotations

import math
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.speculation import StepTimes
from gpt_dist.model.gpt import GPT
from serve.client import Client
from tests.serve.conftest import CONTEXT, TOKENIZER, LiveServer, StartServer
from tests.serve.http.conftest import openai, openai_client

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}


def test_the_text_is_that_of_grpc(ai: openai.OpenAI, grpc_client: Client) -> None:
    mine = ai.completions.create(model="gpt2", prompt="to be", **GREEDY)
    same = grpc_client.generate("to be", temperature=0, max_new_tokens=8, ignore_eos=True)
    assert mine.choices[0].text == same.outputs[0].text
    assert mine.choices[0].finish_reason == "length"
    assert mine.object == "text_completion"
    assert mine.model == "gpt2"
    assert mine.system_fingerprint == grpc_client.info().system_fingerprint
    assert mine.usage is not None
    assert (mine.usage.prompt_tokens, mine.usage.completion_tokens) == (same.usage.prompt_tokens, 8)
    assert mine.usage.total_tokens == mine.usage.prompt_tokens + 8


def test_every_option_reaches_the_model(ai: openai.OpenAI, grpc_client: Client) -> None:
    mine = ai.completions.create(
        model="", prompt="to be", max_tokens=12, temperature=0.9, top_p=0.95, n=2, seed=7,
        presence_penalty=0.2, frequency_penalty=0.1, logit_bias={"9": 2}, stop=["zz", "qq"],
        extra_body={"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 3,
                    "stop_token_ids": [11], "include_stop_str_in_output": True},
    )  # fmt: skip
    same = grpc_client.generate(
        "to be", max_new_tokens=12, temperature=0.9, top_p=0.95, n=2, seed=7,
        presence_penalty=0.2, frequency_penalty=0.1, logit_bias={9: 2}, stop_sequences=["zz", "qq"],
        top_k=30, min_p=0.01, repetition_penalty=1.1, min_new_tokens=3, stop_token_ids=[11],
        include_stop_sequence=True,
    )  # fmt: skip
    assert [choice.text for choice in mine.choices] == [output.text for output in same.outputs]
    assert [choice.index for choice in mine.choices] == [0, 1]
    # A negative seed is as good as any, and -1 keeps all tokens.
    for extra in ({"top_k": -1}, {"top_k": 0}):
        again = ai.completions.create(
            model="", prompt="to be", max_tokens=5, seed=-3, extra_body=extra
        )
        assert again.choices[0].text == grpc_client.generate(
            "to be", max_new_tokens=5, seed=2**64 - 3
        ).outputs[0].text  # fmt: skip


def test_prompts_of_every_kind(ai: openai.OpenAI, grpc_client: Client) -> None:
    ids = TOKENIZER.encode("to be")
    texts = {}
    for prompt in ("to be", ids, ["to be"], [ids]):
        answer = ai.completions.create(model="gpt2", prompt=prompt, **GREEDY)  # type: ignore[arg-type]
        texts[str(prompt)] = answer.choices[0].text
    assert len(set(texts.values())) == 1
    many = ["to be", "or not", "", "Ünïcödé"]
    answer = ai.completions.create(model="gpt2", prompt=many, n=2, seed=5, max_tokens=6)
    assert [choice.index for choice in answer.choices] == list(range(8))
    for index, prompt in enumerate(many):
        alone = grpc_client.generate(prompt, n=2, seed=5, max_new_tokens=6)
        mine = [choice.text for choice in answer.choices[2 * index : 2 * index + 2]]
        assert mine == [output.text for output in alone.outputs]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(TOKENIZER.encode(text)) or 1 for text in many)


def test_more_prompts_than_slots_and_queue(
    ai: openai.OpenAI, grpc_client: Client, server: LiveServer
) -> None:
    prompts = [[1 + index % 50] for index in range(400)]
    answer = ai.completions.create(model="gpt2", prompt=prompts, **(GREEDY | {"max_tokens": 2}))
    assert len(answer.choices) == 400
    for index in (0, 49, 399):
        same = grpc_client.generate(
            prompts[index], temperature=0, max_new_tokens=2, ignore_eos=True
        )
        assert answer.choices[index].text == same.outputs[0].text
    server.wait_at_rest()


def test_why_a_text_ended(ai: openai.OpenAI, grpc_client: Client) -> None:
    free = grpc_client.generate([5], temperature=0, max_new_tokens=30, ignore_eos=True).outputs[0]
    until = free.text[4:8]
    cut = ai.completions.create(
        model="", prompt=[5], temperature=0, max_tokens=30, stop=until,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert cut.choices[0].text == free.text[: free.text.index(until)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].stop_reason == until  # type: ignore[attr-defined]
    full = ai.completions.create(
        model="", prompt=[5] * (CONTEXT - 2), max_tokens=99, extra_body={"ignore_eos": True}
    )
    assert full.choices[0].finish_reason == "length"
    default = ai.completions.create(model="", prompt=[5], extra_body={"ignore_eos": True})
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def test_streams_add_up(ai: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "", "prompt": "to be", "n": 3, "seed": 4, "max_tokens": 30}
    whole = ai.completions.create(**options, logprobs=2)
    texts, scores, reasons = {}, {}, {}
    usage = None
    for chunk in ai.completions.create(
        **options, logprobs=2, stream=True, stream_options={"include_usage": True}
    ):
        assert chunk.system_fingerprint == whole.system_fingerprint
        assert usage is None, "a chunk after the usage"
        usage = chunk.usage
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            found = scores.setdefault(choice.index, {})
            for name, values in choice.logprobs or {}:
                found.setdefault(name, []).extend(values or [])
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        assert bool(chunk.choices) == (usage is None)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert reasons[choice.index] == choice.finish_reason
        assert choice.logprobs is not None
        assert scores[choice.index] == choice.logprobs.model_dump()
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    for chunk in ai.completions.create(**options, stream=True):
        assert chunk.usage is None


def test_a_stream_of_many_prompts(ai: openai.OpenAI, server: LiveServer) -> None:
    options: dict[str, Any] = {
        "model": "", "prompt": [[token] for token in range(1, 21)], "n": 2, "seed": 1,
        "max_tokens": 5, "echo": True,
    }  # fmt: skip
    whole = ai.completions.create(**options)
    texts: dict[int, str] = {}
    for chunk in ai.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}
    server.wait_at_rest()


def test_server_sent_events(http: httpx.Client) -> None:
    """What `curl -N` sees."""
    body = {"prompt": "to be", "stream": True, "max_tokens": 3}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        lines = list(answer.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line == "" or line.startswith("data: ") for line in lines)


def test_logprobs_and_echo(ai: openai.OpenAI, model: GPT, grpc_client: Client) -> None:
    """As lm-eval asks for them: the prompt's own log-probabilities, and one token more."""
    text = "to be, or not to be: Ünï"
    ids = TOKENIZER.encode(text)
    answer = ai.completions.create(
        model="", prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    [choice] = answer.choices
    assert choice.text.startswith(text)
    found = choice.logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    expected = [logits[place, token].item() for place, token in enumerate(ids[1:])]
    best = logits.max(1).values.tolist()
    assert found.token_logprobs[0] is None
    np.testing.assert_allclose(found.token_logprobs[1 : len(ids)], expected, atol=1e-4)
    for place, top in enumerate(found.top_logprobs[1 : len(ids)]):
        assert max(top.values()) == pytest.approx(best[place], abs=1e-4)
    assert len(found.token_logprobs) == len(ids) + 1
    assert found.tokens is not None
    assert found.text_offset is not None
    for token, offset in zip(found.tokens[: len(ids)], found.text_offset, strict=False):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token
    # No new token: only the prompt.
    scored = ai.completions.create(model="", prompt=text, max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == text
    assert scored.choices[0].logprobs is not None
    np.testing.assert_allclose(scored.choices[0].logprobs.token_logprobs[1:], expected, atol=1e-4)
    assert scored.usage is not None
    assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (len(ids), 0)
    same = grpc_client.score(text)
    assert math.fsum(scored.choices[0].logprobs.token_logprobs[1:]) == pytest.approx(
        same.total_logprob, abs=1e-4
    )


def test_truncated_prompts_echo_what_was_used(ai: openai.OpenAI) -> None:
    text = "to be, or not to be " * 60
    kept = TOKENIZER.decode(TOKENIZER.encode(text)[-7:])
    answer = ai.completions.create(
        model="", prompt=text, max_tokens=1, echo=True, extra_body={"truncate_prompt_tokens": 7}
    )
    assert answer.choices[0].text.startswith(kept)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 7
    ids = [1 + index % 9 for index in range(2 * CONTEXT)]
    long = ai.completions.create(
        model="", prompt=ids, max_tokens=1, extra_body={"truncate_prompt_tokens": 7}
    )
    assert long.usage is not None
    assert long.usage.prompt_tokens == 7


def test_guesses_from_earlier_answers_to_the_same_key(
    start: StartServer, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepTimes, "estimate", lambda self, rows: np.ones(rows + 1))
    server = start(Decoder(model, max_slots=1, dtype="fp32", speculate=True), http_port=0)
    accepted = []
    for key in ("one", "one", "other"):
        answer = openai_client(server, api_key=key).completions.create(
            model="gpt2", prompt=[5, 6, 7, 8] * 3, temperature=0, max_tokens=60,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert answer.usage is not None
        assert answer.usage.completion_tokens_details is not None
        accepted.append(answer.usage.completion_tokens_details.accepted_prediction_tokens or 0)
    assert accepted[1] > 2 * max(accepted[0], accepted[2])
