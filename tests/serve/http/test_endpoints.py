"""The other endpoints, errors, and who may call."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import grpc
import httpx
import httpx2
import pytest

from gpt_dist.errors import GptDistError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.api.status import StatusError
from serve.client import Client, build_request
from serve.http import errors
from serve.options import Options
from tests.components import require
from tests.serve.conftest import (
    CONTEXT,
    PATIENCE,
    TOKENIZER,
    VOCABULARY,
    HeldDecoder,
    LiveServer,
    StartServer,
    wait_until,
)
from tests.serve.http.conftest import openai, openai_client, url
from tests.serve.test_security import Authority

LONG = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}


def error(answer: httpx.Response) -> dict[str, Any]:
    """The error object of an answer, in OpenAI's shape."""
    found = answer.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return dict(found["error"])


def test_models(ai: openai.OpenAI, http: httpx.Client) -> None:
    [model] = ai.models.list()
    assert (model.id, model.object, model.owned_by) == ("gpt2", "model", "gpt_dist")
    assert ai.models.retrieve("gpt2") == model
    with pytest.raises(openai.NotFoundError) as caught:
        ai.models.retrieve("gpt3")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        ai.completions.create(model="gpt3", prompt="x")
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == CONTEXT


def test_tokens(http: httpx.Client) -> None:
    text = "to be 👩‍🚀 <|endoftext|>"
    made = http.post("/tokenize", json={"prompt": text}).json()
    assert made["tokens"] == TOKENIZER.encode(text)
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    back = http.post("/detokenize", json={"tokens": made["tokens"], "model": "gpt2"}).json()
    assert back["prompt"] == text
    wrong = http.post("/detokenize", json={"tokens": [VOCABULARY]})
    assert wrong.status_code == 400


def test_health_and_metrics(start: StartServer, model: GPT) -> None:
    server = start(http_port=0)
    with httpx.Client(base_url=url(server)) as http:
        assert http.get("/health").status_code == 503
        loading = http.post("/v1/completions", json={"prompt": "x"})
        assert (loading.status_code, error(loading)["code"]) == (503, "loading")
        assert int(loading.headers["retry-after"]) >= 1
        server.use(Decoder(model, max_slots=1, dtype="fp32"))
        assert http.get("/health").json() == {"status": "SERVING"}
        assert http.head("/health").status_code == 200
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        counted = 'gpt_dist_calls_total{code="OK",method="POST /v1/completions"} 1.0'
        wait_until(lambda: counted in http.get("/metrics").text)  # a moment after the answer
        text = http.get("/metrics").text
        assert 'gpt_dist_rejections_total{reason="loading"} 1.0' in text


def test_a_base_model_has_no_chat(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="without a chat template"):
        ai.chat.completions.create(model="gpt2", messages=[{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1 << 40}, "max_tokens"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": True}, "n"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": -1}, "logprobs"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop[1]"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {str(VOCABULARY): 1}}, "logit_bias"),
        ({"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": "x", "stream_options": {}}, "stream_options"),
        ({"prompt": "x", "temprature": 1}, "temprature"),
        ({"prompt": [[1], "x", {}]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [VOCABULARY]}, "prompt"),
        ({"prompt": [1] * (CONTEXT + 1)}, "prompt"),
        ({"prompt": "word " * 500}, "prompt"),
        ({"prompt": ["x"] * 2049}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
    ],
)  # fmt: skip
def test_errors_name_the_parameter(
    http: httpx.Client, server: LiveServer, body: dict[str, Any], param: str
) -> None:
    data = json.dumps(body)
    answer = http.post("/v1/completions", content=data)
    found = error(answer)
    assert (answer.status_code, found["param"]) == (400, param), found
    assert found["type"] == "invalid_request_error"
    assert found["message"].startswith(param.partition("[")[0])


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"prompt": NaN}', b'{"temperature": Infinity}',
     b"[" * 100_000, b'{"prompt":' + b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}",
     b'{"prompt": [' + b"[1]," * 5000 + b"[1]]}", b'{"prompt": ["[' + b'"' * 5000,
     rb'{"prompt": "\ud800"}', rb'{"prompt": "x", "max_tok\ud800s": 2}',
     rb'{"stream_options": {"\ud800": 2}}',
     rb'{"prompt": "x", "max_tok\ns": 2}', rb'{"\u0000": 2}', rb'{"a.b[0]": 2}', rb'{"": 2}'],
)  # fmt: skip
def test_bodies_that_are_no_requests(http: httpx.Client, data: bytes) -> None:
    answer = http.post("/v1/completions", content=data)
    assert answer.status_code == 400, answer.text[:200]
    error(answer)


def test_brackets_in_a_text_are_no_lists(http: httpx.Client) -> None:
    text = r'[{"\"' * 3000
    assert http.post("/tokenize", json={"prompt": text}).json()["tokens"] == TOKENIZER.encode(text)


def test_expected_weights(http: httpx.Client, server: LiveServer) -> None:
    body = {"prompt": "x", "max_tokens": 1, "expected_weights_version": "v0"}
    answer = http.post("/v1/completions", json=body)
    assert (answer.status_code, error(answer)["code"]) == (412, "weights_version_mismatch")
    assert http.post("/v1/completions", json=body | {"expected_weights_version": "v1"}).is_success


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    unknown = ("GET /", "POST /v2/x", "DELETE /v1/models", "GET /v1/completions", "BREW /x")
    for method, path in (call.split() for call in unknown):
        answer = http.request(method, path)
        assert (answer.status_code, error(answer)["code"]) == (404, "unknown_method")


def test_long_bodies_are_refused(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"), http_port=0, max_message_bytes=10_000)
    with httpx.Client(base_url=url(server)) as http:
        answer = http.post("/v1/completions", json={"prompt": "x" * 20_000})
        assert (answer.status_code, error(answer)["code"]) == (413, "message_too_large")
        assert http.post("/tokenize", json={"prompt": "x" * 5000}).is_success
        assert http.get("/health").is_success


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize", "/health", "/x"])
def test_a_long_body_is_refused_before_it_arrives(server: LiveServer, path: str) -> None:
    """By its declared length: only the head is sent. In chunks, as soon as it is too long."""
    served = server.server.service.served
    assert served is not None
    most = served.limits.request_bytes
    assert most < Options(checkpoint=Path()).max_message_bytes < 1 << 20
    chunk = b"transfer-encoding: chunked\r\n\r\n%x\r\n" % (most + 1) + b" " * (most + 1)
    for rest in (b"content-length: %d\r\n\r\n" % (most + 1), chunk):
        address = ("127.0.0.1", server.server.http_port or 0)
        with socket.create_connection(address, timeout=PATIENCE) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\n".encode() + rest)
            answer = connection.makefile("rb").readline()
        assert answer.startswith(b"HTTP/1.1 413 "), rest[:40]


def test_the_longest_body_is_read(server: LiveServer, http: httpx.Client) -> None:
    most = server.server.gate.max_message_bytes
    for length, code in ((most, 400), (most + 1, 413)):
        assert http.post("/tokenize", content=b" " * length).status_code == code


def test_request_ids(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "serve")
    body = {"prompt": "x", "max_tokens": 2, "user": "somebody", "ignore_eos": True}
    answer = http.post("/v1/completions", json=body, headers={"x-request-id": "abc-123"})
    assert answer.headers["x-request-id"] == "abc-123"
    assert answer.json()["id"] == "cmpl-abc-123"
    found = (r for r in caplog.records if getattr(r, "request_id", "") == "abc-123")
    wait_until(lambda: any(getattr(r, "request_id", "") == "abc-123" for r in caplog.records))
    record: Any = next(found)
    assert (record.code, record.completion_tokens, record.user) == ("OK", 2, "somebody")
    wrong = http.post("/v1/completions", json={"n": 0}, headers={"x-request-id": "x" * 200})
    assert len(wrong.headers["x-request-id"]) == 32


def test_a_full_queue_is_429_and_the_client_comes_back(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, http_port=0, max_queue=0)
    taken = Client(server.target)._stub
    decoder.hold()
    running = taken.Generate.future(build_request([1], max_new_tokens=2))
    wait_until(lambda: len(server.scheduler.jobs) == 1)
    with httpx.Client(base_url=url(server)) as http:
        answer = http.post("/v1/completions", json=LONG)
    assert (answer.status_code, error(answer)["code"]) == (429, "rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        openai_client(server).completions.create(model="", prompt="x")
    decoder.release()
    assert running.result(PATIENCE)
    again = openai_client(server, max_retries=8).completions.create(model="", prompt="x")
    assert again.choices


def test_openai_does_not_repeat_what_broke_an_engine() -> None:
    for code, reason, retried in (
        (grpc.StatusCode.ABORTED, "ENGINE_FAILED", False),
        (grpc.StatusCode.INTERNAL, "INTERNAL", False),
        (grpc.StatusCode.UNAVAILABLE, "DRAINING", True),
    ):
        after = 1.0 if retried else None
        failure = StatusError(code, "message", reason, retry_after=after)
        status, headers = errors.status_of(failure), errors.headers(failure)
        assert status >= 500
        client = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1")
        answer = httpx2.Response(status, headers=headers)
        assert client._should_retry(answer) == retried


def test_tokens_and_cross_origin(start: StartServer, model: GPT, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alpha\n")
    origin = "https://page.example"
    server = start(
        Decoder(model, max_slots=1, dtype="fp32"), http_port=0, auth_token_file=tokens,
        cors_origins=(origin,),
    )  # fmt: skip
    with pytest.raises(openai.AuthenticationError) as caught:
        openai_client(server, api_key="beta").completions.create(model="", prompt="x")
    assert caught.value.code == "invalid_api_key"
    assert openai_client(server, api_key="alpha").completions.create(model="", prompt="x").choices
    with httpx.Client(base_url=url(server)) as http:
        assert http.get("/health").is_success
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nowhere"):
            answer = http.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        head = {"origin": origin, "access-control-request-method": "POST"}
        assert http.options("/v1/completions", headers=head).is_success
        allowed = http.get("/health", headers={"origin": origin})
        assert allowed.headers["access-control-allow-origin"] == origin
        other = http.get("/health", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
    counted = server.server.metrics.rejections.labels("unauthenticated")
    assert counted._value.get() == 5


def test_no_page_may_call_unless_it_is_named(http: httpx.Client) -> None:
    answer = http.get("/health", headers={"origin": "https://page.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_tls_of_the_same_flags(start: StartServer, model: GPT, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    cert, key = authority.issue("server")
    mine, my_key = authority.issue("client")
    server = start(
        Decoder(model, max_slots=1, dtype="fp32"), http_port=0, tls_cert=cert, tls_key=key,
        tls_ca=authority.path,
    )  # fmt: skip
    context = ssl.create_default_context(cafile=str(authority.path))
    with httpx.Client(base_url=url(server, "https"), verify=context) as stranger:
        with pytest.raises(httpx.TransportError):
            stranger.get("/health")
    context.load_cert_chain(mine, my_key)
    with httpx.Client(base_url=url(server, "https"), verify=context) as known:
        assert known.get("/health").is_success
        assert known.post("/v1/completions", json={"prompt": "x"}).is_success
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url(server)}/health")


def test_curl_prints_tokens_as_they_come(start: StartServer, model: GPT) -> None:
    curl = require("curl")
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, http_port=0, stream_interval=0)
    decoder.hold()
    [letter] = TOKENIZER.encode("x")
    body = json.dumps(LONG | {"stream": True, "max_tokens": 6, "logit_bias": {str(letter): 1000}})
    process = subprocess.Popen(
        [curl, "-sN", f"{url(server)}/v1/completions", "-d", body],
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    texts = ""
    for _ in range(6):
        decoder.allow(1)
        line = b""
        while not line.startswith(b"data: {"):
            line = process.stdout.readline()
        texts += json.loads(line[6:])["choices"][0]["text"]
    assert texts == "xxxxxx"
    assert process.communicate(timeout=PATIENCE)[0].strip().endswith(b"data: [DONE]")


def test_a_taken_port_is_one_clear_error(start: StartServer, server: LiveServer) -> None:
    with pytest.raises(GptDistError, match=r"cannot serve HTTP on 127.0.0.1:\d+: .*--http-port"):
        start(http_port=server.server.http_port)
