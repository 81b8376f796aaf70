"""Calls that are turned away: each is logged with peer and request id, and counted by reason."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.gate import Gate
from serve.client import build_request
from serve.inference import grpc_service_pb2 as kserve
from serve.logs import PlainFormatter
from tests.serve.conftest import PATIENCE, HeldDecoder, LiveServer, StartServer, wait_until

SERVICE = "/gpt_dist.v1.GenerationService"
REQUEST_ID = "my-request-7"


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("alpha\n")
    return path


@pytest.fixture(scope="module")
def guarded(start: StartServer, model: GPT, token_file: Path) -> LiveServer:
    """A server with a token and a small limit on messages."""
    decoder = Decoder(model, max_slots=2, dtype="fp32")
    return start(decoder, auth_token_file=token_file, max_message_bytes=10_000)


def refusal(
    server: LiveServer, method: str, data: bytes = b"", token: str | None = "alpha"
) -> grpc.RpcError:
    """Send bytes to a method, with a request id; returns the error."""
    metadata = [("x-request-id", REQUEST_ID)]
    if token is not None:
        metadata.append(("authorization", f"Bearer {token}"))
    with grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(data, metadata=metadata, timeout=PATIENCE)
    return caught.value


def reason(error: grpc.RpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    assert status is not None, error
    assert status.details[0].Unpack(info)
    return str(info.reason)


def count(server: LiveServer, why: str) -> float:
    return float(server.server.metrics.rejections.labels(why)._value.get())


def line(caplog: pytest.LogCaptureFixture) -> Any:
    """The log line of the call. It may follow the answer."""
    found: list[Any] = []

    def logged() -> bool:
        found[:] = [
            record
            for record in list(caplog.records)
            if getattr(record, "request_id", "") == REQUEST_ID
        ]
        return bool(found)

    wait_until(logged, "the call's log line")
    [record] = found
    return record


@pytest.mark.parametrize(
    ("method", "data", "token", "code", "why"),
    [
        ("Generate", b"", None, "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ("Generate", b"x" * 9_000, "guess", "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ("GenerateStream", b"", "guess", "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ("NoSuchMethod", b"", None, "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ("NoSuchMethod", b"", "alpha", "UNIMPLEMENTED", "UNKNOWN_METHOD"),
        ("Generate", b"x" * 15_000, "alpha", "RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE"),
        ("GenerateBatch", b"x" * 15_000, "alpha", "RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE"),
    ],
)
def test_a_refusal_is_logged_and_counted(
    guarded: LiveServer,
    caplog: pytest.LogCaptureFixture,
    method: str,
    data: bytes,
    token: str | None,
    code: str,
    why: str,
) -> None:
    caplog.set_level(logging.INFO)
    before = count(guarded, why.lower())
    error = refusal(guarded, f"{SERVICE}/{method}", data, token)
    assert (error.code().name, reason(error)) == (code, why)
    assert dict(error.trailing_metadata())["x-request-id"] == REQUEST_ID
    assert count(guarded, why.lower()) == before + 1
    record = line(caplog)
    assert record.peer.startswith("ipv4:127.0.0.1:")
    assert record.code == code
    known = hasattr(api, f"{method}Request")
    assert record.method == (f"{SERVICE[1:]}/{method}" if known else "unknown")
    if not known:
        assert record.called == f"{SERVICE}/{method}"
        assert guarded.server.metrics.calls.labels("unknown", code)._value.get() > 0


def test_a_message_far_beyond_the_limit_is_counted_too(
    guarded: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    """grpc itself refuses what is more than twice the limit, and says nothing to the server."""
    caplog.set_level(logging.INFO)
    before = count(guarded, "no_message")
    error = refusal(guarded, f"{SERVICE}/Generate", b"x" * 100_000)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert line(caplog).peer.startswith("ipv4:127.0.0.1:")
    assert count(guarded, "no_message") == before + 1


def test_a_name_from_a_caller_forges_no_log_line(
    start: StartServer, model: GPT, caplog: pytest.LogCaptureFixture
) -> None:
    """With the Open Inference Protocol callers choose names of parameters."""
    caplog.set_level(logging.INFO)
    server = start(Decoder(model, max_slots=1, dtype="fp32"), kserve=True)
    name = "x\n2026-01-31T12:00:00Z info gpt_dist.v1.GenerationService/Generate OK\x1b[2J" * 100
    request = kserve.ModelInferRequest(model_name="gpt2")
    for tensor, value in (("text_input", "a"), ("sampling_parameters", json.dumps({name: 1}))):
        request.inputs.add(name=tensor, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(len(value).to_bytes(4, "little") + value.encode())
    error = refusal(
        server, "/inference.GRPCInferenceService/ModelInfer", request.SerializeToString()
    )
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    text = PlainFormatter().format(line(caplog))
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text) < 1000
    assert text.count("inference.GRPCInferenceService/ModelInfer INVALID_ARGUMENT") == 1


def test_reflection_needs_a_token(guarded: LiveServer) -> None:
    with grpc.insecure_channel(guarded.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(iter(requests)))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        metadata = [("authorization", "Bearer alpha")]
        [answer] = stub.ServerReflectionInfo(iter(requests), metadata=metadata)
        assert len(answer.list_services_response.service) == 4


def test_open_calls_are_bounded_and_health_has_room(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder, max_calls=2)
    decoder.hold()
    with grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
        send = channel.unary_unary(f"{SERVICE}/Generate")
        request = build_request([1], max_new_tokens=2).SerializeToString()
        calls = [send.future(request, timeout=PATIENCE) for _ in range(2)]
        wait_until(lambda: server.open_calls == 2)
        error = refusal(server, "/gpt_dist.v1.ModelService/GetModelInfo")
        assert (error.code().name, reason(error)) == ("RESOURCE_EXHAUSTED", "TOO_MANY_CALLS")
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status
        decoder.release()
        for call in calls:
            call.result(PATIENCE)
        wait_until(lambda: server.open_calls == 0)
        info = channel.unary_unary("/gpt_dist.v1.ModelService/GetModelInfo")
        assert info(b"", timeout=PATIENCE)


def test_health_streams_are_bounded_and_quiet(
    start: StartServer, model: GPT, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    server.server.gate.max_watches = 3
    registry = server.server.metrics.registry
    with grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            next(watch)
        assert registry.get_sample_value("gpt_dist_health_watches") == 3
        error = refusal(server, "/grpc.health.v1.Health/Watch")
        assert reason(error) == "TOO_MANY_WATCHES"
        watches[0].cancel()
        wait_until(lambda: registry.get_sample_value("gpt_dist_health_watches") == 2)
        assert stub.Check(health_pb2.HealthCheckRequest()).status
    wait_until(lambda: registry.get_sample_value("gpt_dist_health_watches") == 0)

    def lines() -> list[Any]:
        return [record for record in list(caplog.records) if "Health" in record.getMessage()]

    wait_until(lines)
    assert [record.error for record in lines()] == ["3 calls are open"]


def test_a_caller_that_sends_no_message_is_let_go(start: StartServer, model: GPT) -> None:
    """It would hold one of the places for calls."""
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    server.server.gate.message_seconds = 0.05
    with grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
        silent = channel.stream_unary(f"{SERVICE}/Generate").future(_forever(), timeout=PATIENCE)
        assert silent.exception(PATIENCE).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert reason(silent.exception()) == "NO_MESSAGE"


def _forever() -> Any:
    import threading

    threading.Event().wait(PATIENCE)
    yield b""


def test_the_gate_counts_what_is_open() -> None:
    from serve.api.status import StatusError
    from serve.metrics import Metrics

    gate = Gate(Metrics(), max_calls=1, max_watches=1)
    for method in ("a.B/C", "grpc.health.v1.Health/Watch"):
        who = gate.enter(method, {})
        with pytest.raises(StatusError, match="1 calls are open"):
            gate.enter(method, {})
        gate.leave(method, who)
        gate.enter(method, {})


def test_one_caller_leaves_places_to_others() -> None:
    from serve.api.status import StatusError
    from serve.metrics import Metrics

    gate = Gate(Metrics(), max_calls=16)
    for _ in range(14):
        gate.enter("a.B/C", {}, "hog:1")
    with pytest.raises(StatusError, match="14 calls are open"):
        gate.enter("a.B/C", {}, "hog:1")
    first, _ = (gate.enter("a.B/C", {}, f"light:{port}") for port in range(2))
    with pytest.raises(StatusError, match="16 calls are open"):
        gate.enter("a.B/C", {}, "other:1")
    gate.leave("a.B/C", first)
    with pytest.raises(StatusError):
        gate.enter("a.B/C", {}, "hog:1")
    gate.enter("a.B/C", {}, "other:1")
