"""What the API promises beyond the text: the model, the weights, sums, limits and versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import errors_pb2
from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.status import StatusError
from serve.client import Client, build_request
from tests.serve.api.conftest import details
from tests.serve.conftest import (
    CONTEXT,
    PATIENCE,
    TOKENIZER,
    VOCABULARY,
    HeldDecoder,
    LiveServer,
    StartServer,
    tiny_model,
    wait_until,
)


def calls(client: Client) -> dict[str, Callable[..., Any]]:
    """One call of every method, by its name; keywords are fields of the request."""
    return {
        "Generate": lambda **fields: client.generate([1], max_new_tokens=2, **fields),
        "GenerateStream": lambda **fields: list(client.stream([1], max_new_tokens=2, **fields)),
        "Score": lambda **fields: client.score([1, 2], **fields),
        "Tokenize": lambda **_: client.tokenize("to be"),
        "Detokenize": lambda **_: client.detokenize([1]),
        "GetModelInfo": lambda **_: client.info(),
        "GetServerStatus": lambda **_: client.status(),
    }


def refusal(call: Callable[..., Any], **fields: Any) -> tuple[str, str]:
    """Status and reason of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call(**fields)
    found = details(caught.value)["ErrorInfo"]
    assert found.domain == "gpt_dist"
    return caught.value.code().name, found.reason


def test_every_request_may_name_the_model(server: LiveServer) -> None:
    for name in ("", "gpt2"):
        for call in calls(Client(server.target, model=name)).values():
            call()
    other = Client(server.target, model="gpt3")
    for call in calls(other).values():
        assert refusal(call) == ("NOT_FOUND", "UNKNOWN_MODEL")
    [item] = other.batch([[1]])
    assert item.error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert "this server serves 'gpt2'" in item.error.message
    server.wait_at_rest()


def test_expected_weights(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder)
    client = Client(server.target)
    version = client.info().weights_version
    work = {name: calls(client)[name] for name in ("Generate", "GenerateStream", "Score")}
    for call in work.values():
        call(expected_weights_version=version)
        failed = refusal(call, expected_weights_version="v0")
        assert failed == ("FAILED_PRECONDITION", "WEIGHTS_VERSION_MISMATCH")
    # The weights change while the call waits for a slot.
    decoder.hold()
    first = client._stub.Generate.future(build_request([1], max_new_tokens=2, ignore_eos=True))
    wait_until(lambda: decoder.held)
    late = client._stub.Generate.future(build_request([2], expected_weights_version=version))
    wait_until(lambda: len(server.scheduler.jobs) == 2)
    server.engine.swap(decoder.decoder.load_weights(tiny_model(1)), "v2")
    decoder.release()
    assert first.result(PATIENCE).weights_version == version
    code = late.exception(PATIENCE).code()
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert client.generate([1], max_new_tokens=1).weights_version == "v2"
    server.wait_at_rest()


def test_every_response_says_what_computed_it(client: Client) -> None:
    info = client.info()
    parts = info.system_fingerprint.split("/")
    backend = f"{info.backend}:{info.device}"
    assert parts == [info.weights_version, info.dtype, backend, info.server_version]
    tokenized = client._stub.Tokenize(api.TokenizeRequest(text="to be"))
    detokenized = client._stub.Detokenize(api.DetokenizeRequest(token_ids=[1]))
    pieces = list(client.stream([1], max_new_tokens=2, n=2))
    started = [piece.started for piece in pieces if piece.HasField("started")]
    answers = [client.generate([1], max_new_tokens=2), client.score([1, 2]), client.status()]
    for answer in (*answers, *started, tokenized, detokenized):
        assert answer.system_fingerprint == info.system_fingerprint
    assert len(started) == 2


def test_usage_can_be_added_up(client: Client) -> None:
    prompt = list(range(1, 100))
    options: dict[str, Any] = {"n": 3, "seed": 1, "max_new_tokens": 5}
    whole = client.generate(prompt, **options).usage
    again = client.generate(prompt, **options).usage
    assert whole.prompt_tokens == again.prompt_tokens == len(prompt)
    assert again.cached_tokens == len(prompt) - 1  # and not three times as many
    assert (whole.drafted_tokens, whole.accepted_tokens) == (0, 0)
    ends = [piece.finished for piece in client.stream(prompt, **options) if piece.finished.usage]
    streamed = [end.usage for end in ends if end.finish_reason]
    assert len(streamed) == 3
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
        assert sum(getattr(usage, name) for usage in streamed) == getattr(again, name)
    assert client.score(prompt).usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize("shared", [False, True])
def test_a_salt_parts_the_cache(start: StartServer, model: GPT, shared: bool) -> None:
    decoder = Decoder(model, max_slots=4, dtype="fp32")
    client = Client(start(decoder, shared_prefix_cache=shared).target)
    prompt = list(range(1, 101))

    def cached(**fields: Any) -> int:
        usage = client.generate(prompt, max_new_tokens=1, ignore_eos=True, **fields).usage
        return int(usage.cached_tokens)

    assert [cached(), cached(cache_salt="a"), cached(cache_salt="b")] == [0, 0, 0]
    assert [cached(), cached(cache_salt="a"), cached(cache_salt="b")] == [99, 99, 99]
    other = list(range(100, 0, -1))
    client.score(other, cache_salt="a")
    prompt = other
    assert cached() == 0
    assert cached(cache_salt="a") == 99
    with pytest.raises(grpc.RpcError) as caught:
        cached(cache_salt="x" * 257)
    [violation] = details(caught.value)["BadRequest"].field_violations
    assert violation.field == "cache_salt"


def test_truncated_prompts(client: Client) -> None:
    prompt = [1 + index % (VOCABULARY - 1) for index in range(CONTEXT + 50)]
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4}
    kept = client.generate(prompt, truncate_prompt_tokens=20, **options)
    assert kept.usage.prompt_tokens == 20
    assert kept.outputs == client.generate(prompt[-20:], **options).outputs
    text = "to be, or not to be " * 60
    short = client.generate(text, truncate_prompt_tokens=20, **options)
    assert short.outputs == client.generate(TOKENIZER.encode(text)[-20:], **options).outputs
    same = client.generate(prompt[:9], truncate_prompt_tokens=20, **options)
    assert same.usage.prompt_tokens == 9
    for wrong in (0, CONTEXT + 1):
        with pytest.raises(grpc.RpcError) as caught:
            client.generate([1], truncate_prompt_tokens=wrong)
        [violation] = details(caught.value)["BadRequest"].field_violations
        assert violation.field == "config.truncate_prompt_tokens"


def test_unset_and_zero_are_not_the_same(client: Client) -> None:
    """Where the server chooses a default, a request can tell 0 from nothing."""
    for message in ("SamplingParams", "StoppingCriteria", "OutputOptions", "GenerationConfig"):
        descriptor = api.DESCRIPTOR.pool.FindMessageTypeByName(f"gpt_dist.v1.{message}")
        for field in descriptor.fields:
            plain = field.is_repeated or field.message_type or field.type == field.TYPE_BOOL
            assert plain or field.has_presence, field.full_name


@pytest.mark.slow(5)
def test_responses_too_large_are_refused_before_the_work(start: StartServer) -> None:
    decoder = HeldDecoder(Decoder(tiny_model(context=400), max_slots=64, dtype="fp32"))
    server = start(decoder)
    client = Client(server.target)
    most: dict[str, Any] = {"n": 32, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    with pytest.raises(grpc.RpcError) as caught:
        client.generate([1], max_new_tokens=450, **most)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    found = details(caught.value)
    assert found["ErrorInfo"].reason == "RESPONSE_TOO_LARGE"
    [item] = client.batch([[1]], max_new_tokens=450, **most)
    assert item.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert decoder.calls == 0
    # A stream sends the same in pieces. What is a little smaller than the limit fits.
    assert next(client.stream([1], max_new_tokens=450, **most)).token_ids
    answer = client.generate([1], max_new_tokens=370, **most)
    assert 3 << 20 < answer.ByteSize() < 4 << 20
    server.wait_at_rest()


@pytest.mark.slow(5)
def test_a_batch_is_read_as_there_is_room_for_it(
    start: StartServer, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be larger than any message, and its requests wait at the client."""
    server = start(Decoder(model, max_slots=2, dtype="fp32"), max_message_bytes=100_000)
    loads: list[int] = []
    submit = server.scheduler.submit

    def spy(jobs: Any) -> None:
        submit(jobs)
        loads.append(len(server.scheduler.jobs))

    monkeypatch.setattr(server.scheduler, "submit", spy)
    stops = [f"{index:x}" * 250 for index in range(15)]  # to make the requests long
    items = list(
        Client(server.target).batch(
            ([1 + index % 50] for index in range(300)), max_new_tokens=1, stop_sequences=stops
        )
    )
    assert sorted(item.request_index for item in items) == list(range(300))
    assert all(len(item.response.outputs) == 1 for item in items)
    assert max(loads) <= 4  # twice the slots, though the queue has room for 256
    server.wait_at_rest()


def test_an_iterator_that_fails_ends_the_batch(client: Client, server: LiveServer) -> None:
    def prompts() -> Iterator[list[int]]:
        yield [1]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(client.batch(prompts()))
    with pytest.raises(TypeError, match="temprature"):
        next(client.batch([[1]], temprature=1))
    server.wait_at_rest()


def test_every_reason_is_documented() -> None:
    for name, number in errors_pb2.ErrorReason.items():
        if number:
            reason = name.removeprefix("ERROR_REASON_")
            assert StatusError(grpc.StatusCode.INTERNAL, "", reason).reason == reason
    with pytest.raises(ValueError):
        StatusError(grpc.StatusCode.INTERNAL, "", "BAD_LUCK")


# Requests of the clients before version 1: field 1 of both was what it is now; sampling,
# stopping and output were fields 2 to 4, and a batch was a list in field 1 of one message.
OLD_PROMPT = b"\x0a\x04\x12\x02\x0a\x00"  # {prompt {token_ids {ids: [0]}}}
OLD_SAMPLING = b"\x12\x02\x10\x05"  # sampling {top_k: 5}
OLD = {
    "Generate": OLD_PROMPT + OLD_SAMPLING,
    "GenerateStream": OLD_PROMPT + OLD_SAMPLING,
    "GenerateBatch": b"\x0a" + bytes([len(OLD_PROMPT)]) + OLD_PROMPT,
}


@pytest.mark.parametrize("method", OLD)
def test_old_clients_get_a_clear_error(server: LiveServer, method: str) -> None:
    channel = grpc.insecure_channel(server.target)
    name = f"/gpt_dist.v1.GenerationService/{method}"
    call: Any = channel.unary_unary if method == "Generate" else channel.unary_stream
    with pytest.raises(grpc.RpcError) as caught:
        list(call(name)(OLD[method]))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)["ErrorInfo"].reason == "UNKNOWN_FIELD"
    assert "another version of gpt_dist.v1" in caught.value.details()


def test_old_clients_cannot_ask_for_what_has_moved(server: LiveServer) -> None:
    channel = grpc.insecure_channel(server.target)
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/gpt_dist.v1.GenerationService/GetModelInfo")(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_unknown_fields_inside_are_noticed(server: LiveServer) -> None:
    channel = grpc.insecure_channel(server.target)
    request = build_request([1], max_new_tokens=1)
    config = request.config.SerializeToString() + b"\xa0\x06\x01"  # field 100
    data = OLD_PROMPT + b"\x3a" + bytes([len(config)]) + config
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/gpt_dist.v1.GenerationService/Generate")(data)
    assert details(caught.value)["ErrorInfo"].reason == "UNKNOWN_FIELD"
