"""OpenTelemetry spans of calls. Off by default; then a call only compares a name with None.

A call has a span of kind SERVER, whose parent the caller names (``traceparent``, W3C Trace
Context). Below it each output has three: ``queue`` until it gets a slot, ``prefill`` until its
first token, ``decode`` until its end. They are made when the call has ended, from times that are
noted anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from gpt_dist.errors import UsageError
from serve.phases import Phase

CONTEXT = ("traceparent", "tracestate")
"""What names the parent, in metadata and headers."""
LONGEST = 512
"""Characters of each of them; longer ones are ignored."""


class Tracer:
    """Makes the spans of calls.

    Args:
        provider: an ``opentelemetry.sdk.trace.TracerProvider``.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._trace = provider, trace
        self._tracer = provider.get_tracer("gpt_dist")
        self._propagator = TraceContextTextMapPropagator()

    def call(
        self,
        name: str,
        began: int,
        ended: int,
        code: grpc.StatusCode,
        metadata: Mapping[str, Any],
        phases: list[Phase],
        attributes: Mapping[str, Any],
    ) -> None:
        """Make the spans of a call that has ended.

        Args:
            name: of its method.
            began: when it arrived, in nanoseconds since 1970.
            ended: when it ended.
            code: how it ended.
            metadata: what the caller sent.
            phases: the parts of its outputs.
            attributes: what the log says about it.
        """
        carrier = {
            key: value
            for key in CONTEXT
            if isinstance(value := metadata.get(key), str) and len(value) <= LONGEST
        }
        parent = self._propagator.extract(carrier)
        service, _, method = name.rpartition("/")
        known: dict[str, str | int | float] = {
            "rpc.system": "grpc" if service.count(".") else "http",
            "rpc.service": service,
            "rpc.method": method,
            "rpc.response.status_code": code.name,
        }
        known |= {
            f"gpt_dist.{key}": value if isinstance(value, int | float) else str(value)[:LONGEST]
            for key, value in attributes.items()
        }
        span = self._tracer.start_span(
            name, parent, self._trace.SpanKind.SERVER, known, start_time=began
        )
        if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            span.set_status(self._trace.StatusCode.ERROR, str(attributes.get("error", code.name)))
        below = self._trace.set_span_in_context(span, parent)
        for phase in phases:
            child = self._tracer.start_span(
                phase.name, below, attributes=phase.attributes, start_time=phase.began
            )
            child.end(phase.ended)
        span.end(ended)

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def make_tracer() -> Tracer:
    """A tracer that sends its spans where the OTEL_* variables say.

    Raises:
        UsageError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UsageError("--trace needs OpenTelemetry: pip install 'gpt_dist[tracing]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "gpt_dist"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)
