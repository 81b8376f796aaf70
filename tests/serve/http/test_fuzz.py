"""Requests made from the OpenAPI description, and malformed ones: never a 500."""

from __future__ import annotations

import json
import os
import random
import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import PATIENCE, LiveServer, errors
from tests.serve.soak import Leaks

COUNT = 100_000 if os.environ.get("SOAK") else 1000
DESCRIBED = COUNT // 10
"""Requests made from the description of each of three endpoints. The others are malformed."""
VALID = {200, 400, 404, 412, 413, 429}
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "integer": st.integers(-5, 5) | st.integers(),
    "number": st.floats(-2, 3) | st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
    "string": st.text(max_size=20),
    "null": st.none(),
}
ANYTHING = st.recursive(
    st.one_of(*SCALARS.values()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def described(schema: dict[str, Any], parts: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a JSON schema allows."""
    if "$ref" in schema:
        return described(parts[schema["$ref"].rpartition("/")[2]], parts)
    if "anyOf" in schema:
        return st.one_of(*[described(part, parts) for part in schema["anyOf"]])
    match schema.get("type"):
        case "array":
            return st.lists(described(schema["items"], parts), max_size=6)
        case "object" if "properties" in schema:
            fields = {name: described(field, parts) for name, field in schema["properties"].items()}
            needed = {name: fields.pop(name) for name in schema.get("required", [])}
            return st.fixed_dictionaries(needed, optional=fields)
        case "object":
            return st.dictionaries(
                st.integers(-1, 400).map(str) | st.text(max_size=5), SCALARS["number"], max_size=4
            )
        case str(kind):
            return SCALARS[kind]
    return ANYTHING


@pytest.fixture(scope="module")
def description(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
def test_described_requests_never_cause_internal_errors(
    server: LiveServer, http: httpx.Client, description: dict[str, Any],
    caplog: pytest.LogCaptureFixture, path: str,
) -> None:  # fmt: skip
    parts = description["components"]["schemas"]
    content = description["paths"][path]["post"]["requestBody"]["content"]
    valid = described(content["application/json"]["schema"], parts)
    wrong = st.dictionaries(st.sampled_from([*parts["CompletionRequest"]["properties"]]), ANYTHING)
    codes: dict[int, int] = {}

    @settings(max_examples=DESCRIBED, deadline=None, suppress_health_check=list(HealthCheck))
    @given(valid | st.tuples(valid, wrong).map(lambda pair: {**pair[0], **pair[1]}))
    def check(body: Any) -> None:
        if isinstance(body, dict) and isinstance(body.get("max_tokens"), int):
            body["max_tokens"] = min(body["max_tokens"], 4)  # or it takes long
        answer = http.post(path, json=body)
        codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
        assert answer.status_code in VALID, (answer.text, body)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    leaks = Leaks(server)
    check()
    leaks.check(f"HTTP: requests made from the description of {path}", codes, memory=False)
    assert {200, 400} <= set(codes), codes
    assert errors(caplog) == []


@pytest.mark.slow
def test_malformed_bodies_never_cause_internal_errors(
    server: LiveServer, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(3)
    seeds = [
        {"prompt": "to be, or not to be, " * 3, "temperature": 0.5, "n": 2, "max_tokens": 3,
         "stop": ["a", "b"], "logit_bias": {"1": 2.0}, "logprobs": 2, "stream": True, "echo": True,
         "seed": 3},
        {"prompt": [[1, 2], [3]], "max_tokens": 2, "stream": True,
         "stream_options": {"include_usage": True}},
    ]  # fmt: skip
    codes: dict[int, int] = {}

    def storm(count: int) -> None:
        for _ in range(count):
            data = bytearray(json.dumps(draw.choice(seeds)).encode())
            for _ in range(draw.choice((1, 1, 2, 4))):
                at = draw.randrange(len(data))
                match draw.randrange(4):
                    case 0:
                        data[at] = draw.randrange(256)
                    case 1:
                        del data[at : at + draw.randint(1, 6)]
                    case 2:
                        data[at:at] = draw.choice(
                            (b"[", b'"', b"null", b"1e999", b"\\ud800", b"{}")
                        )
                    case 3:
                        data[at:at] = str(draw.choice((-1, 0, 10**6, 2**64, 1e300))).encode()
            answer = http.post("/v1/completions", content=bytes(data), timeout=PATIENCE)
            codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
            assert answer.status_code in VALID, (answer.text, data)

    storm(COUNT // 10)
    leaks = Leaks(server)
    codes.clear()
    storm(COUNT - 3 * DESCRIBED)
    leaks.check("HTTP: malformed bodies", codes)
    assert codes[400] > COUNT / 4, codes
    assert codes[200] > COUNT / 100, codes
    assert errors(caplog) == []


@pytest.mark.parametrize(
    "data",
    [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a port without it
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\n\r\n",  # smuggled
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 50_000 + b"\r\n",
    ],
)
def test_broken_framing(server: LiveServer, http: httpx.Client, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.server.http_port or 0)) as connection:
        connection.settimeout(PATIENCE)
        answer = b""
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(4096):
                answer += part
        except OSError:
            pass
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert b"200 OK" not in answer
    assert http.get("/health").is_success
