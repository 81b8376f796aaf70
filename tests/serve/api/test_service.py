"""The API through a real channel: responses, streams, errors and their details."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_pb2 as pb
from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1 import model_service_pb2 as model_api
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.client import AsyncClient, Client, build_request
from serve.engine.jobs import Finish
from tests.serve.api.conftest import details, joined, unpacked
from tests.serve.conftest import (
    CONTEXT,
    PATIENCE,
    TOKENIZER,
    VOCABULARY,
    Clock,
    HeldDecoder,
    LiveServer,
    StartServer,
    wait_until,
)


def test_finish_reasons_are_those_of_the_api() -> None:
    assert {f"FINISH_REASON_{reason.name}": reason.value for reason in Finish} == {
        name: number for name, number in pb.FinishReason.items() if number
    }


def test_options_reach_the_model(client: Client, model: GPT) -> None:
    prompt = [5, 6, 7]
    greedy = client.generate(prompt, temperature=0, max_new_tokens=8, ignore_eos=True)
    ids = list(greedy.outputs[0].token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]]))[0, 2:-1]
    assert ids == logits.argmax(1).tolist()
    top = client.generate(
        prompt, temperature=0, max_new_tokens=8, ignore_eos=True, logprobs=True, top_logprobs=4
    )
    expected = logits.double().log_softmax(-1).topk(4)
    for row, entry in enumerate(top.outputs[0].logprobs):
        assert entry.token == TOKENIZER.token_bytes(entry.token_id)
        assert [other.token_id for other in entry.top] == expected.indices[row].tolist()
        np.testing.assert_allclose(
            [other.logprob for other in entry.top], expected.values[row], atol=1e-4
        )
    biased = client.generate(prompt, logit_bias={9: 1000}, max_new_tokens=3)
    assert list(biased.outputs[0].token_ids) == [9, 9, 9]
    # Output i of n equals a request with seed + i. The seed in effect can be reused.
    many = client.generate(prompt, n=3, max_new_tokens=6)
    for index, output in enumerate(many.outputs):
        again = client.generate(prompt, seed=many.seed + index, max_new_tokens=6)
        assert again.outputs[0].token_ids == output.token_ids
    # A seed of 64 bits wraps around.
    client.generate(prompt, seed=2**64 - 1, n=2, max_new_tokens=1)


def test_stopping(client: Client) -> None:
    free = client.generate([5], temperature=0, max_new_tokens=30, ignore_eos=True).outputs[0]
    ids = list(free.token_ids)
    stop = client.generate([5], temperature=0, ignore_eos=True, stop_token_ids=[ids[3]]).outputs[0]
    assert stop.finish_reason == pb.FINISH_REASON_STOP_TOKEN
    assert list(stop.token_ids) == ids[: ids.index(ids[3])]
    assert stop.stop_token_id == ids[3]
    full = client.generate([5] * (CONTEXT - 2), max_new_tokens=30, ignore_eos=True)
    assert full.outputs[0].finish_reason == pb.FINISH_REASON_CONTEXT_FULL
    assert full.usage.completion_tokens == 3
    until = free.text[4:8]
    kept = client.generate(
        [5], temperature=0, ignore_eos=True, stop_sequences=[until], include_stop_sequence=True
    ).outputs[0]
    assert kept.text == free.text[: free.text.index(until) + len(until)]
    # A stream's usage counts the returned tokens.
    pieces = list(client.stream([5], temperature=0, ignore_eos=True, stop_sequences=[until]))
    assert pieces[-1].finished.usage.completion_tokens == len(kept.token_ids)


def test_empty_text_begins_a_document(client: Client) -> None:
    assert client.generate("", max_new_tokens=1).usage.prompt_tokens == 1
    same = [
        list(client.generate(prompt, temperature=0, max_new_tokens=5).outputs[0].token_ids)
        for prompt in ("", [TOKENIZER.eot_id])
    ]
    assert same[0] == same[1]


def test_a_time_budget_returns_what_there_is(start: StartServer, model: GPT) -> None:
    decoder, clock = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32")), Clock()
    server = start(decoder, clock)
    client = Client(server.target)
    decoder.hold()
    call = client._stub.Generate.future(
        build_request([1], max_new_tokens=140, time_budget=0.25, ignore_eos=True)
    )
    decoder.allow(5)
    wait_until(lambda: decoder.held)
    clock.now += 0.25
    decoder.release()  # the current step ends, and no other begins
    response = call.result(PATIENCE)
    [output] = response.outputs
    assert output.finish_reason == pb.FINISH_REASON_TIME_BUDGET
    assert len(output.token_ids) == 6
    assert response.timings.total.ToMilliseconds() == 250
    assert response.timings.time_to_first_token.ToMilliseconds() == 0


def test_score(client: Client, model: GPT) -> None:
    text = "to be, or not to be: Ünï"
    ids = TOKENIZER.encode(text)
    for prepend in (False, True):
        response = client.score(text, top_logprobs=2, prepend_end_of_text=prepend)
        context = [TOKENIZER.eot_id, *ids] if prepend else ids
        with torch.no_grad():
            logprobs = model(torch.tensor([context]))[0].double().log_softmax(-1)
        expected = [logprobs[i, token].item() for i, token in enumerate(context[1:])]
        assert [token.token_id for token in response.tokens] == ids
        found = [token.logprob for token in response.tokens if token.HasField("logprob")]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert response.scored_tokens == len(expected)
        assert response.total_logprob == pytest.approx(sum(expected), abs=1e-3)
        assert b"".join(token.token for token in response.tokens).decode() == text


def test_tokenize_and_detokenize(client: Client, server: LiveServer) -> None:
    text = "to be 👩‍🚀 <|endoftext|>"
    assert client.tokenize(text) == TOKENIZER.encode(text)
    assert client.detokenize(client.tokenize(text)) == text
    long = text * 1000  # so long that it is tokenised in a thread
    assert client.detokenize(client.tokenize(long)) == long
    with pytest.raises(grpc.RpcError) as caught:
        client.detokenize([VOCABULARY])
    assert details(caught.value)["BadRequest"].field_violations[0].field == "token_ids"


def test_info(client: Client) -> None:
    info, status = client.info(), client.status()
    assert (info.max_context, info.vocab_size, status.max_slots) == (CONTEXT, VOCABULARY, 8)
    assert (info.name, info.tokenizer, info.dtype, info.device) == ("gpt2", "bpe", "fp32", "cpu")
    assert info.backend in ("kernels-avx512", "kernels-avx2", "cuda-graphs", "pytorch")
    assert info.end_of_text_id == TOKENIZER.eot_id


def test_batch(client: Client, server: LiveServer) -> None:
    """A batch larger than slots and queue together, two of its requests invalid."""
    assert len(server.scheduler.decoder.free_slots) == 8
    prompts = [[1 + index % 9] * (1 + index % 50) for index in range(300)]
    requests = [
        build_request(prompt, seed=index, max_new_tokens=4) for index, prompt in enumerate(prompts)
    ]
    requests[7].config.sampling.top_p = 3
    requests[8].prompt.Clear()
    stream = (api.GenerateBatchRequest(request=request) for request in requests)
    answers = {}
    for item in client._stub.GenerateBatch(stream, timeout=PATIENCE):
        assert item.request_index not in answers
        answers[item.request_index] = item
    assert set(answers) == set(range(300))
    for index, field in ((7, "config.sampling.top_p"), (8, "prompt")):
        assert answers[index].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        found = unpacked(answers[index].error)
        assert found["ErrorInfo"].reason == "INVALID_FIELD"
        assert found["BadRequest"].field_violations[0].field == field
    for index in (0, 9, 150, 299):
        alone = client.generate(prompts[index], seed=index, max_new_tokens=4)
        assert answers[index].response.outputs == alone.outputs
    assert list(client.batch([])) == []


def test_a_batch_gives_way_to_others(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(decoder, max_queue=2)
    client = Client(server.target)
    decoder.hold()
    other = client._stub.Generate.future(
        build_request([1], max_new_tokens=150, n=2, ignore_eos=True)
    )
    wait_until(lambda: len(server.scheduler.jobs) == 2)
    items: list[api.GenerateBatchResponse] = []
    prompts = [[token] for token in range(1, 20)]
    reader = threading.Thread(target=lambda: items.extend(client.batch(prompts, max_new_tokens=2)))
    reader.start()
    wait_until(lambda: len(server.scheduler.jobs) == 4)  # the rest of the batch finds no room
    decoder.release()
    reader.join(PATIENCE)
    assert sorted(item.request_index for item in items) == list(range(19))
    assert all(item.WhichOneof("result") == "response" for item in items)
    assert len(other.result(PATIENCE).outputs) == 2
    server.wait_at_rest()
    # A batch that finds no room at all is refused.
    decoder.hold()
    blocked = [client._stub.Generate.future(build_request([1], n=2)) for _ in range(2)]
    wait_until(lambda: len(server.scheduler.jobs) == 4)
    with pytest.raises(grpc.RpcError) as caught:
        list(client.batch([[1], [2]]))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    decoder.release()
    assert all(len(call.result(PATIENCE).outputs) == 2 for call in blocked)
    server.wait_at_rest()


def patient(server: LiveServer) -> Client:
    """A client that does not repeat calls."""
    client = Client(server.target)
    client._channel = grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)])
    client._stub = GenerationServiceStub(client._channel)  # type: ignore[no-untyped-call]
    return client


def test_a_full_queue_is_refused_with_a_hint(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(decoder, max_queue=3)
    client = Client(server.target)
    decoder.hold()
    taken = [client._stub.Generate.future(build_request([1], max_new_tokens=2)) for _ in range(5)]
    wait_until(lambda: len(server.scheduler.jobs) == 5)
    client = patient(server)
    for call in (client.generate, client.score, lambda ids: list(client.stream(ids))):
        with pytest.raises(grpc.RpcError) as caught:
            call([1])
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        found = details(caught.value)
        assert found["ErrorInfo"].reason == "QUEUE_FULL"
        assert 0.1 <= found["RetryInfo"].retry_delay.ToMilliseconds() / 1000 <= 10
    decoder.release()
    assert all(call.result(PATIENCE).usage.completion_tokens <= 2 for call in taken)
    server.wait_at_rest()


def test_seeded_requests_do_not_depend_on_others(start: StartServer, model: GPT) -> None:
    decoder = Decoder(model, max_slots=32, dtype="fp32", deterministic=True)
    client = Client(start(decoder).target)

    def ask(seed: int, tokens: int = 30) -> list[int]:
        response = client.generate([seed] * 20, seed=seed, max_new_tokens=tokens, top_p=0.95)
        return list(response.outputs[0].token_ids)

    alone = ask(77)
    with ThreadPoolExecutor(32) as pool:
        others = [pool.submit(ask, seed, 60) for seed in range(31)]
        among = pool.submit(ask, 77)
        assert among.result() == alone
        assert all(len(other.result()) > 0 for other in others)


def test_request_ids(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "serve")
    client = Client(server.target, request_id="abc-123")
    _, call = client._stub.Generate.with_call(
        build_request([1], max_new_tokens=2), metadata=client.metadata
    )
    assert ("x-request-id", "abc-123") in [tuple(pair) for pair in call.trailing_metadata()]

    def logged() -> list[Any]:
        return [r for r in list(caplog.records) if getattr(r, "request_id", "") == "abc-123"]

    wait_until(logged)  # after the answer
    record = logged()[0]
    assert (record.code, record.prompt_tokens) == ("OK", 1)
    with pytest.raises(grpc.RpcError) as caught:
        client.generate([1], temperature=-1)
    assert ("x-request-id", "abc-123") in [tuple(p) for p in caught.value.trailing_metadata()]
    # The server makes one if none is given, or if it is not fit for a log.
    _, call = client._model_stub.GetModelInfo.with_call(
        model_api.GetModelInfoRequest(), metadata=[("x-request-id", "x" * 200)]
    )
    made = dict(tuple(pair) for pair in call.trailing_metadata())["x-request-id"]
    assert len(made) == 32


def test_asyncio_client(server: LiveServer) -> None:
    async def run() -> None:
        async with AsyncClient(server.target) as client:
            assert await client.health()
            assert (await client.info()).max_context == CONTEXT
            assert (await client.status()).max_slots == 8
            options = {"seed": 4, "max_new_tokens": 9}
            whole = await client.generate("to be", **options)
            pieces = [piece async for piece in client.stream("to be", **options)]
            assert joined(pieces)[0] == whole.outputs[0]
            batch = [item async for item in client.batch(["a", "b"], **options)]
            assert {item.request_index for item in batch} == {0, 1}
            ids = await client.tokenize("to be")
            assert await client.detokenize(ids) == "to be"
            assert (await client.score("to be")).scored_tokens == len(ids) - 1
            with pytest.raises(TypeError, match="temprature"):
                await client.generate("x", temprature=1)

    asyncio.run(run())
