"""What the server counts, for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from serve.engine.jobs import Finish
from serve.engine.scheduler import Scheduler

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gpt_dist_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(
                f"gpt_dist_{name}", text, labels, buckets=SECONDS, registry=self.registry
            )

        self.calls = counter("calls", "RPCs by method and status code", "method", "code")
        self.call_seconds = histogram("call_seconds", "Duration of RPCs", "method")
        self.rejections = counter("rejections", "Calls not accepted, by reason", "reason")
        self.cancelled = counter("cancelled", "Sequences given up by their callers")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of accepted prompts")
        self.generated_tokens = counter("generated_tokens", "Tokens of finished sequences")
        self.finished_sequences = counter("finished", "Finished sequences by reason", "reason")
        self.queue_time = histogram("queue_seconds", "From arrival to the first computation")
        self.time_to_first_token = histogram("time_to_first_token_seconds", "From arrival")
        self.inter_token = histogram("inter_token_seconds", "Between two tokens of a sequence")
        for reason in Finish:
            self.finished_sequences.labels(reason.name.lower())

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when it is scraped."""
        Gauge(f"gpt_dist_{name}", text, registry=self.registry).set_function(value)

    def watch(self, scheduler: Scheduler) -> None:
        """Add the gauges of a scheduler."""
        decoder = scheduler.decoder
        self.gauge("running", "Sequences in a slot", lambda: len(scheduler.running))
        self.gauge("waiting", "Jobs that wait for a slot", lambda: scheduler.waiting)
        self.gauge("slots", "Sequences that can run at once", lambda: decoder.max_slots)
        self.gauge("queue_limit", "Jobs that may wait", lambda: scheduler.max_queue)
        self.gauge(
            "kv_tokens",
            "Tokens that running sequences have in the cache",
            lambda: sum(decoder.length(slot) for slot in list(scheduler.running)),
        )
        self.gauge(
            "kv_capacity_tokens",
            "Tokens that the cache can hold",
            lambda: decoder.max_slots * decoder.max_context,
        )

    def finished(self, reason: Finish, tokens: int) -> None:
        """Count a finished sequence."""
        self.finished_sequences.labels(reason.name.lower()).inc()
        self.generated_tokens.inc(tokens)

    def serve(self, host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
        """Answer scrapes on a port, in a thread.

        Raises:
            OSError: the port is taken.
        """
        return start_http_server(port, host, self.registry)
