"""Attacks from a list, each with what it gets; docs/security.md has the same list.

After each of them the server answers health and a call, has logged no error and no forged line, and
holds nothing.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import socket
import ssl
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.client import Client, build_request
from serve.inference import grpc_service_pb2 as kserve
from serve.logs import PlainFormatter
from tests.serve.conftest import PATIENCE, HeldDecoder, LiveServer, StartServer, errors, wait_until
from tests.serve.test_security import Authority

TOKEN = "8RkVq0Gx2mLw"
GENERATE = "/gpt_dist.v1.GenerationService/Generate"
FORGED = "2026-01-31T12:00:00Z info gpt_dist.v1.GenerationService/Generate OK 1.0 ms"
PAGE = Path(__file__).parents[2] / "docs/security.md"


@dataclass
class Target:
    """A server with tokens, TLS where ``tls`` is set, and all protocols."""

    server: LiveServer
    ca: Path | None

    def channel(self, *options: tuple[str, Any], compression: Any = None) -> grpc.Channel:
        given: Any = [("grpc.enable_retries", 0), *options]
        return grpc.insecure_channel(self.server.target, given, compression)

    def call(
        self, request: Any = None, metadata: dict[str, str] | None = None, **options: Any
    ) -> str:
        """The status of a call, and the reason if the server gave one."""
        metadata = {"authorization": f"Bearer {TOKEN}"} | (metadata or {})
        request = request if request is not None else build_request([1], max_new_tokens=1)
        with self.channel() as channel:
            stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            return status(
                lambda: stub.Generate(
                    request, metadata=list(metadata.items()), timeout=PATIENCE, **options
                )
            )

    def raw(self, *parts: bytes, port: int = 0, pause: float = 0.0) -> bytes:
        """What comes back for some bytes, until the server closes or says nothing for a second."""
        address = ("127.0.0.1", port or self.server.server.http_port)
        received = b""
        with socket.create_connection(address, timeout=PATIENCE) as connection:
            try:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)
                connection.settimeout(1)
                while data := connection.recv(1 << 16):
                    received += data
                    if b"connection: close" not in received and received.endswith(b"}"):
                        break  # the server waits for the next request
            except OSError:
                pass
        return received

    def post(self, body: bytes, path: str = "/v1/completions", **headers: str) -> httpx.Response:
        given = {"authorization": f"Bearer {TOKEN}"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        port = self.server.server.http_port
        return httpx.post(
            f"http://127.0.0.1:{port}{path}", content=body, headers=given, timeout=PATIENCE
        )

    def http2(self, *frames: bytes) -> bytes:
        """What comes back for HTTP/2 frames on a new connection: kinds of frames, in order."""
        data = self.raw(PREFACE, *frames, port=self.server.server.port)
        kinds = bytearray()
        while len(data) >= 9:
            kinds.append(data[3])
            data = data[9 + int.from_bytes(data[:3], "big") :]
        return bytes(kinds)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
DATA, RESET, GOAWAY = 0, 3, 7


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """An HTTP/2 frame."""
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


def status(work: Callable[[], Any]) -> str:
    """The name of the status that a call ends with."""
    try:
        work()
    except grpc.RpcError as error:
        return str(error.code().name)  # type: ignore[attr-defined]
    return "OK"


def head(**fields: str) -> bytes:
    """The head of a POST, with further fields."""
    lines = ["POST /v1/completions HTTP/1.1", "host: a", f"authorization: Bearer {TOKEN}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


BODY = json.dumps({"prompt": "a", "max_tokens": 1}).encode()


@pytest.fixture(scope="module")
def target(start: StartServer, model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = tmp_path_factory.mktemp("attacks") / "tokens"
    path.write_text(f"{TOKEN} name=us\n")
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(
        decoder, auth_token_file=path, http_port=0, kserve=True, max_calls=64, max_connection_age=0
    )
    return Target(server, None)


# ---- The log ------------------------------------------------------------------------------------


def request_id(target: Target) -> None:
    assert target.call(metadata={"x-request-id": f"a) {FORGED} ("}) == "OK"
    assert target.call(metadata={"x-request-id": "a" * 500}) == "OK"


def parameter_name(target: Target) -> None:
    request = kserve.ModelInferRequest(model_name="gpt2")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"a")
    request.parameters[f"x\n{FORGED}\x1b[2J"].int64_param = 1
    with target.channel() as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", kserve.ModelInferRequest.SerializeToString
        )
        metadata = [("authorization", f"Bearer {TOKEN}")]
        assert status(lambda: call(request, metadata=metadata)) == "INVALID_ARGUMENT"


def model_name(target: Target) -> None:
    request = build_request([1], model=f"x\n{FORGED}\r\u2028\x1b]0;title\x07")
    assert target.call(request) == "NOT_FOUND"


def unknown_method(target: Target) -> None:
    with target.channel() as channel:
        for name in ("/a b/c) OK (", f"/{'x' * 3000}/y"):
            metadata = [("authorization", f"Bearer {TOKEN}")]
            assert status(lambda: channel.unary_unary(name)(b"", metadata=metadata)) in (  # noqa: B023
                "UNIMPLEMENTED",
                "RESOURCE_EXHAUSTED",
                "INTERNAL",
            )


def path_with_newline(target: Target) -> None:
    assert target.post(BODY, f"/v1/%0a{FORGED.replace(' ', '%20')}").status_code == 404


def user_with_newline(target: Target) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": f"x\n{FORGED}"}).encode()
    assert target.post(body).status_code == 200


# ---- Heads and framing --------------------------------------------------------------------------


def huge_metadata(target: Target) -> None:
    big = ("grpc.max_metadata_size", 1 << 22)
    with target.channel(big, ("grpc.absolute_max_metadata_size", 1 << 22)) as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        metadata = [("authorization", f"Bearer {TOKEN}"), ("x", "a" * (1 << 20))]
        request = build_request([1], max_new_tokens=1)
        assert status(lambda: stub.Generate(request, metadata=metadata)) in (
            "RESOURCE_EXHAUSTED",
            "UNAVAILABLE",
        )


def huge_headers(target: Target) -> None:
    answer = target.raw(head(x="a" * (1 << 18)) + BODY)
    assert answer == b"" or b" 400 " in answer or b" 431 " in answer


def two_lengths(target: Target) -> None:
    data = head(content_length=str(len(BODY))).replace(
        b"\r\n\r\n", b"\r\ncontent-length: 5\r\n\r\n"
    )
    assert b" 400 " in target.raw(data + BODY)


def length_and_chunks(target: Target) -> None:
    """The body ends where the chunks say; a smuggled request gets no answer of its own."""
    inner = b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n"
    chunks = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
    data = head(content_length=str(len(chunks) + len(inner)), transfer_encoding="chunked")
    answer = target.raw(data + chunks + inner)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in answer.lower()
    assert answer.count(b"HTTP/1.1") == 1


def odd_transfer_encoding(target: Target) -> None:
    for value in ("xchunked", "chunked, identity", "\x0bchunked"):
        answer = target.raw(head(transfer_encoding=value) + b"0\r\n\r\n")
        assert b" 400 " in answer or b" 501 " in answer, value


def split_header(target: Target) -> None:
    for bad in (b"x: a\x00b", b"x y: a", b"x: a\rset-cookie: b", b": a", b"\xff: a"):
        data = head().replace(b"\r\n\r\n", b"\r\n" + bad + b"\r\n\r\n")
        answer = target.raw(data)
        assert b" 400 " in answer, bad
        assert b"set-cookie" not in answer.lower()


def chunk_sizes(target: Target) -> None:
    for size in (b"-1", b"fffffffffffffffff", b"0x5", b"1" * 500):
        answer = target.raw(head(transfer_encoding="chunked") + size + b"\r\nabcde\r\n0\r\n\r\n")
        assert b" 200 " not in answer, size


def long_request_line(target: Target) -> None:
    answer = target.raw(b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nhost: a\r\n\r\n")
    assert answer == b"" or b" 400 " in answer


def endless_continuation(target: Target) -> None:
    """CVE-2024-27316: a head that never ends."""
    flood = frame(9, b"\x00" * 16000, stream=1) * 200
    seen = target.http2(frame(1, b"\x82", stream=1), flood)
    assert {GOAWAY, RESET} & set(seen) or len(seen) <= 3


def wrong_frames(target: Target) -> None:
    for bad in (
        frame(8, (0).to_bytes(4, "big")),  # a window that grows by 0
        frame(8, (0x7FFFFFFF).to_bytes(4, "big")) * 2,  # beyond 2**31
        frame(0, b"x", stream=1),  # data of a stream that is idle
        frame(4, b"\0" * 5),  # settings of a wrong length
        frame(1, b"\xff" * 50, flags=4, stream=1),  # a head that cannot be decoded
    ):
        seen = target.http2(bad)
        assert DATA not in seen, bad  # no answer, as to a call


def ping_flood(target: Target) -> None:
    target.http2(frame(6, b"12345678") * 5000)


def rapid_reset(target: Target) -> None:
    """CVE-2023-44487: streams that are opened and reset at once."""
    with target.channel() as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        request = build_request([1], max_new_tokens=100)
        for _ in range(1000):
            stub.Generate.future(request, metadata=[("authorization", f"Bearer {TOKEN}")]).cancel()


# ---- Time ---------------------------------------------------------------------------------------


def slow_head(target: Target) -> None:
    """Connections that send a byte now and then do not keep others out."""
    address = ("127.0.0.1", target.server.server.http_port)
    half = [socket.create_connection(address) for _ in range(50)]
    for connection in half:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost:")
    assert target.post(BODY).status_code == 200
    for connection in half:
        connection.close()


def slow_body(target: Target) -> None:
    target.server.server.gate.message_seconds = 0.2
    try:
        assert b" 408 " in target.raw(head(content_length="100") + b"{")
        with target.channel() as channel:
            call = channel.stream_unary(GENERATE)
            silence = iter(lambda: time.sleep(2) or b"", b"")
            metadata = [("authorization", f"Bearer {TOKEN}")]
            assert status(lambda: call(silence, metadata=metadata)) == "DEADLINE_EXCEEDED"
    finally:
        target.server.server.gate.message_seconds = 30.0


def slow_reader(target: Target) -> None:
    """A stream that nobody reads delays no other call, and its end frees the slot."""
    body = json.dumps({"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True})
    address = ("127.0.0.1", target.server.server.http_port)
    with socket.create_connection(address) as connection:
        connection.sendall(head(content_length=str(len(body))) + body.encode())
        assert target.call() == "OK"


# ---- Size ---------------------------------------------------------------------------------------


def large_message(target: Target) -> None:
    request = build_request("a" * (3 << 18))
    assert target.call(request) == "RESOURCE_EXHAUSTED"
    assert target.post(b" " * (1 << 20)).status_code == 413


def decompression_bomb(target: Target) -> None:
    """100 MB of zeros in 100 KB are neither expanded nor kept, nor 20 MB in a message."""
    bomb = gzip.compress(bytes(100 << 20), 1)[: 1 << 20]
    request = build_request("a" * (20 << 20))
    metadata = [("authorization", f"Bearer {TOKEN}")]
    with target.channel(("grpc.max_send_message_length", -1)) as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]

        def message() -> Any:
            gzipped = grpc.Compression.Gzip
            return stub.Generate(request, metadata=metadata, compression=gzipped)

        used = []
        for _ in range(3):  # the first times fill the client's own buffers
            assert target.post(bomb, content_encoding="gzip").status_code in (400, 413)
            assert status(message) == "RESOURCE_EXHAUSTED"
            used.append(psutil.Process().memory_info().rss)
    assert used[-1] - used[0] < 90 << 20


def deep_json(target: Target) -> None:
    for body in (b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000):
        assert target.post(body).status_code == 400


def long_numbers(target: Target) -> None:
    for number in (b"9" * 100_000, b"1e999999999", b"-" + b"1" * 5000, b"NaN"):
        assert target.post(b'{"prompt": "a", "seed": ' + number + b"}").status_code == 400


def many_keys(target: Target) -> None:
    body = json.dumps({f"k{number}": 0 for number in range(20_000)}).encode()
    assert target.post(body).status_code == 400


def unknown_fields(target: Target) -> None:
    unknown = api.GenerateRequest.FromString(
        build_request([1]).SerializeToString() + b"\xf8\x07\x01" * 100_000
    )
    assert target.call(unknown) == "INVALID_ARGUMENT"


def half_a_surrogate(target: Target) -> None:
    assert target.post(b'{"prompt": "\\ud800", "max_tokens": 1}').status_code == 400


def large_answer(target: Target) -> None:
    body = {"prompt": ["a"] * 2048, "n": 64, "max_tokens": 150, "logprobs": 20}
    answer = target.post(json.dumps(body).encode())
    assert answer.status_code == 400
    assert "the response could have" in answer.json()["error"]["message"]


# ---- Number -------------------------------------------------------------------------------------


def thousands_of_streams(target: Target) -> None:
    """Calls beyond the limit are refused at once; health has places of its own."""
    decoder = target.server.scheduler.decoder
    decoder.hold()
    with target.channel() as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        metadata = [("authorization", f"Bearer {TOKEN}")]
        request = build_request([1], max_new_tokens=1)
        calls = [stub.Generate.future(request, metadata=metadata) for _ in range(600)]
        wait_until(lambda: sum(call.done() for call in calls) > 500)
        assert {call.code().name for call in calls if call.done()} == {"RESOURCE_EXHAUSTED"}
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        assert health.Check(health_pb2.HealthCheckRequest()).status == 1
        for call in calls:
            call.cancel()
    decoder.release()


def many_connections(target: Target) -> None:
    addresses = [
        ("127.0.0.1", port) for port in (target.server.server.port, target.server.server.http_port)
    ]
    held = [socket.create_connection(address) for address in addresses for _ in range(300)]
    assert target.call() == "OK"
    for connection in held:
        connection.close()


# ---- Who ----------------------------------------------------------------------------------------


def malformed_tokens(target: Target) -> None:
    for given in (
        "", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.lower()}", f"Bearer {TOKEN}, Bearer {TOKEN}", f"Bearer {TOKEN} name=us",
        "Bearer " + "a" * 5000, "Bearer name=us", "Bearer #",
    ):  # fmt: skip
        assert target.call(metadata={"authorization": given}) == "UNAUTHENTICATED", given
        assert target.post(BODY, authorization=given.strip() or "x").status_code == 401, given
    answer = target.raw(head().replace(TOKEN.encode(), "ü".encode()) + BODY)
    assert b" 401 " in answer or b" 400 " in answer


def replayed_token(target: Target) -> None:
    """A token that is taken out of the file is worth nothing within a second."""
    path = target.server.server.options.auth_token_file
    assert path is not None
    path.write_text(f"{TOKEN} name=us\nstolen\n")
    wait_until(lambda: target.call(metadata={"authorization": "Bearer stolen"}) == "OK")
    path.write_text(f"{TOKEN} name=us\n")
    wait_until(
        lambda: target.call(metadata={"authorization": "Bearer stolen"}) == "UNAUTHENTICATED"
    )


def a_thousand_names(target: Target) -> None:
    """Made-up tokens neither make callers nor metrics."""
    for number in range(30):
        target.call(metadata={"authorization": f"Bearer {number}"})
    samples = {
        sample.labels["caller"]
        for family in target.server.server.metrics.registry.collect()
        for sample in family.samples
        if "caller" in sample.labels
    }
    assert samples <= {"us", "other"}


def other_paths(target: Target) -> None:
    for path in ("/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2fmetrics", "//metrics", "/."):
        assert target.post(BODY, path).status_code == 404, path


def foreign_page(target: Target) -> None:
    answer = target.post(BODY, origin="https://evil.example")
    assert "access-control-allow-origin" not in answer.headers


ATTACKS: dict[str, Callable[[Target], None]] = {
    "a request id that looks like a log line": request_id,
    "a parameter's name with a newline and escape sequences": parameter_name,
    "a model's name with a newline": model_name,
    "a method's name that looks like a log line": unknown_method,
    "a path with a newline": path_with_newline,
    "a `user` with a newline": user_with_newline,
    "a megabyte of metadata": huge_metadata,
    "256 KB of headers": huge_headers,
    "two lengths of one body": two_lengths,
    "a length and chunks, with a request behind them": length_and_chunks,
    "an unusual Transfer-Encoding": odd_transfer_encoding,
    "a header that splits the answer": split_header,
    "chunks of negative and huge sizes": chunk_sizes,
    "a request line of a megabyte": long_request_line,
    "an HTTP/2 head that never ends": endless_continuation,
    "HTTP/2 frames that break the rules": wrong_frames,
    "a flood of HTTP/2 pings": ping_flood,
    "streams that are opened and reset at once": rapid_reset,
    "heads sent byte by byte": slow_head,
    "bodies that do not arrive": slow_body,
    "a stream that nobody reads": slow_reader,
    "a message that is too long": large_message,
    "a decompression bomb": decompression_bomb,
    "JSON nested 100,000 deep": deep_json,
    "numbers with 100,000 digits": long_numbers,
    "20,000 unknown keys": many_keys,
    "100,000 unknown protobuf fields": unknown_fields,
    "half of a surrogate pair": half_a_surrogate,
    "a small request for a huge answer": large_answer,
    "more streams than the server takes": thousands_of_streams,
    "600 idle connections": many_connections,
    "malformed tokens": malformed_tokens,
    "a token that was taken away": replayed_token,
    "made-up tokens": a_thousand_names,
    "paths that leave the tree": other_paths,
    "a call from a foreign web page": foreign_page,
}


@pytest.mark.slow(5)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_what_the_page_says(
    target: Target, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "serve")
    ATTACKS[name](target)
    assert target.call() == "OK"
    with Client(target.server.target) as client:
        assert client.health()
    target.server.wait_at_rest()
    wait_until(lambda: target.server.server.gate.calls == 0)
    assert errors(caplog) == []
    lines = [PlainFormatter().format(record) for record in caplog.records]
    for line in lines:
        assert len(line.splitlines()) == 1, line
        assert not line.startswith(FORGED)
        assert not re.search(r"[\x00-\x1f\x7f]", line), line
        assert TOKEN not in line


@pytest.fixture(scope="module")
def encrypted(
    start: StartServer, model: GPT, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LiveServer, Path]:
    authority = Authority(tmp_path_factory.mktemp("authority"), "ours")
    cert, key = authority.issue("server")
    decoder = Decoder(model, max_slots=1, dtype="fp32")
    return start(decoder, tls_cert=cert, tls_key=key, http_port=0), authority.path


def ports(server: LiveServer) -> Iterator[int]:
    yield server.server.port
    assert server.server.http_port is not None
    yield server.server.http_port


def test_tls_is_not_renegotiated(encrypted: tuple[LiveServer, Path]) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    server, ca = encrypted
    for port in ports(server):
        protocol = "h2" if port == server.server.port else "http/1.1"
        done = subprocess.run(
            [openssl, "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_2", "-alpn", protocol,
             "-CAfile", str(ca)],
            input=b"R\n", capture_output=True, timeout=PATIENCE,
        )  # fmt: skip
        said = (done.stdout + done.stderr).decode(errors="replace")
        assert "RENEGOTIATING" in said
        assert re.search("no.renegotiation|handshake failure|error:", said), said[-500:]


def test_old_tls_is_refused(encrypted: tuple[LiveServer, Path]) -> None:
    server, ca = encrypted
    for port in ports(server):
        context = ssl.create_default_context(cafile=str(ca))
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with (
            pytest.raises(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection,
        ):
            context.wrap_socket(connection, server_hostname="localhost")


def test_plain_text_and_noise_on_a_port_with_tls(encrypted: tuple[LiveServer, Path]) -> None:
    server, ca = encrypted
    for port in ports(server):
        for data in (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", PREFACE, bytes(range(256)) * 40):
            address = ("127.0.0.1", port)
            with socket.create_connection(address, timeout=PATIENCE) as connection:
                try:
                    connection.sendall(data)
                    answer = connection.recv(100)
                except OSError:
                    answer = b""
                assert b"200" not in answer
    with Client(server.target, tls_ca=ca) as client:
        assert client.health()


def test_the_page_lists_what_is_tested() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    listed = {row[0] for row in rows}
    assert set(ATTACKS) <= listed, set(ATTACKS) - listed
