"""Spans of calls, as OpenTelemetry's own exporter to memory receives them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.client import Client, build_request
from serve.tracing import Tracer
from tests.components import require_module
from tests.serve.conftest import PATIENCE, LiveServer, StartServer, wait_until
from tests.serve.http.conftest import url

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def server(start: StartServer, model: GPT) -> LiveServer:
    return start(Decoder(model, max_slots=2, dtype="fp32"), http_port=0)


@pytest.fixture
def spans(server: LiveServer) -> Iterator[Any]:
    """The finished spans, which arrive when their call has ended."""
    sdk = require_module("opentelemetry.sdk.trace")
    export = require_module("opentelemetry.sdk.trace.export")
    memory = require_module("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    server.server.gate.tracer = Tracer(provider)

    def finished(count: int) -> dict[str, Any]:
        wait_until(lambda: len(exporter.get_finished_spans()) >= count)
        return {span.name: span for span in exporter.get_finished_spans()}

    yield finished
    server.server.gate.tracer = None


def check_phases(found: dict[str, Any], call: Any) -> None:
    """Queue, prefill and decode follow one another within the call."""
    queue, prefill, decode = (found[name] for name in ("queue", "prefill", "decode"))
    for span in (queue, prefill, decode):
        assert span.parent.span_id == call.context.span_id
        assert span.context.trace_id == call.context.trace_id
    slack = 50_000_000  # the times come from two clocks
    assert call.start_time - slack <= queue.start_time <= queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time <= decode.end_time <= call.end_time + slack
    assert prefill.attributes["gpt_dist.prompt_tokens"] == 3
    assert decode.attributes["gpt_dist.completion_tokens"] == 4


def test_a_call_and_its_phases(server: LiveServer, spans: Any) -> None:
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "abc"))
    with grpc.insecure_channel(server.target) as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        request = build_request([1, 2, 3], max_new_tokens=4, ignore_eos=True)
        stub.Generate(request, metadata=metadata, timeout=PATIENCE)
    found = spans(4)
    call = found["gpt_dist.v1.GenerationService/Generate"]
    assert f"{call.context.trace_id:032x}" == TRACE
    assert f"{call.parent.span_id:016x}" == PARENT
    assert call.kind.name == "SERVER"
    assert call.status.is_unset
    assert call.attributes["gpt_dist.request_id"] == "abc"
    assert call.attributes["rpc.response.status_code"] == "OK"
    check_phases(found, call)


def test_http(server: LiveServer, spans: Any) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, "stream": True}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    path = f"{url(server)}/v1/completions"
    assert httpx.post(path, json=body, headers=headers, timeout=PATIENCE).status_code == 200
    found = spans(4)
    call = found["POST /v1/completions"]
    assert f"{call.context.trace_id:032x}" == TRACE
    check_phases(found, call)


@pytest.mark.parametrize(
    "traceparent",
    # The last is long, but below the 8 KB from which gRPC refuses metadata at random.
    ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "00-" + "f" * 4000],
)
def test_a_malformed_parent_is_ignored(server: LiveServer, spans: Any, traceparent: str) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError):
            stub.Generate(
                build_request([]), metadata=(("traceparent", traceparent),), timeout=PATIENCE
            )
    [call] = spans(1).values()
    assert call.parent is None
    assert call.status.status_code.name == "ERROR"
    assert call.attributes["gpt_dist.error"].startswith("prompt")


def test_health_is_not_traced(server: LiveServer, spans: Any) -> None:
    with Client(server.target) as client:
        assert client.health()
        client.tokenize("a")
    assert list(spans(1)) == ["gpt_dist.v1.GenerationService/Tokenize"]


def test_without_the_flag_nothing_is_noted(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.api.generation import Output

    def never(output: Output) -> None:
        raise AssertionError("phases without a tracer")

    monkeypatch.setattr(Output, "phases", never)
    with Client(server.target) as client:
        assert client.generate([1], max_new_tokens=1).outputs
    program = (
        "import serve.tracing, serve.api.gate, sys; sys.exit('opentelemetry.sdk' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
