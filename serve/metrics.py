"""Metrics for Prometheus."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    make_wsgi_app,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.engine.jobs import Finish
from serve.engine.scheduler import Scheduler

log = logging.getLogger("serve")

MOST_CALLERS = 100
"""So many callers have a label of their own; names come from the token file."""
OTHER = "other"
"""The label of all other callers."""
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

        self.calls = counter("calls", "Calls, by method and status code", "method", "code")
        self.call_seconds = histogram("call_seconds", "Duration of calls", "method")
        self.rejections = counter("rejections", "Rejected calls, by reason", "reason")
        self.cancelled = counter("cancelled", "Sequences cancelled by their callers")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of accepted prompts")
        self.generated_tokens = counter(
            "generated_tokens", "Generated tokens of finished sequences"
        )
        self.drafted_tokens = counter(
            "drafted_tokens", "Guessed tokens that steps of finished sequences verified"
        )
        self.accepted_tokens = counter("accepted_tokens", "Those of them that were right")
        self.finished_sequences = counter("finished", "Finished sequences, by reason", "reason")
        self.queue_time = histogram(
            "queue_seconds", "Time from arrival to the start of the computation"
        )
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Time from arrival to the first token"
        )
        self.inter_token = histogram("inter_token_seconds", "Time between two tokens of a sequence")
        self.caller_calls = counter(
            "caller_calls", "Calls, by caller and status code", "caller", "code"
        )
        self.caller_tokens = counter(
            "caller_tokens", "Tokens, by caller and kind: prompt or generated", "caller", "kind"
        )
        self._callers: set[str] = set()
        self.reloads = counter("reloads", "Attempts to load new weights, by result", "result")
        self.weights = Gauge(
            "gpt_dist_weights", "1 for the weights in use", ["version"], registry=self.registry
        )
        for result in ("ok", "failed"):
            self.reloads.labels(result)
        for reason in Finish:
            self.finished_sequences.labels(reason.name.lower())

    def caller(self, name: str) -> str:
        """The label of a caller."""
        if name and len(self._callers) < MOST_CALLERS:
            self._callers.add(name)
        return name if name in self._callers else OTHER

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is computed at each scrape."""
        Gauge(f"gpt_dist_{name}", text, registry=self.registry).set_function(value)

    def watch(self, scheduler: Scheduler) -> None:
        """Add the gauges of a scheduler."""
        decoder = scheduler.decoder
        self.serving(scheduler.weights.newest)
        self.gauge("live_weights", "Sets of weights in memory", lambda: scheduler.weights.live)
        self.gauge("running", "Sequences being generated", lambda: len(scheduler.slots.running))
        self.registry.register(_Callers(self, scheduler))
        self.gauge("waiting", "Requests waiting for a slot", lambda: scheduler.jobs.waiting)
        self.gauge(
            "load",
            "Running and waiting sequences in relation to the slots: above 1 some wait",
            lambda: len(scheduler.jobs) / decoder.max_slots,
        )
        self.gauge(
            "slots", "Maximum number of sequences generated at once", lambda: decoder.max_slots
        )
        self.gauge("queue_limit", "Maximum number of waiting requests", lambda: scheduler.max_queue)
        self.gauge(
            "kv_tokens",
            "Tokens of running sequences in the KV cache",
            lambda: sum(decoder.length(slot) for slot in list(scheduler.slots.running)),
        )
        self.gauge(
            "kv_capacity_tokens",
            "Capacity of the KV cache in tokens",
            lambda: decoder.max_slots * decoder.max_context,
        )

    def serving(self, version: str) -> None:
        """Note which weights new sequences use."""
        self.weights.clear()
        self.weights.labels(version).set(1)

    def prompted(self, tokens: int, caller: str) -> None:
        """Count the tokens of an accepted prompt."""
        self.prompt_tokens.inc(tokens)
        self.caller_tokens.labels(caller, "prompt").inc(tokens)

    def finished(
        self, reason: Finish, tokens: int, drafted: int, accepted: int, caller: str = OTHER
    ) -> None:
        """Count a finished sequence and its tokens: generated, guessed and rightly guessed."""
        self.caller_tokens.labels(caller, "generated").inc(tokens)
        self.finished_sequences.labels(reason.name.lower()).inc()
        self.generated_tokens.inc(tokens)
        self.drafted_tokens.inc(drafted)
        self.accepted_tokens.inc(accepted)

    def serve(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None = None,
        accepts: Callable[[str], bool] | None = None,
    ) -> tuple[WSGIServer, threading.Thread]:
        """Serve scrapes on a port, in a thread.

        Args:
            host: address to listen on.
            port: 0 picks a free one.
            context: for TLS.
            accepts: whether an ``Authorization`` header carries a valid token.

        Raises:
            OSError: the port is in use.
        """
        scrape = make_wsgi_app(self.registry)

        def answer(environ: dict[str, Any], begin: Any) -> Any:
            if accepts is None or accepts(environ.get("HTTP_AUTHORIZATION", "")):
                return scrape(environ, begin)
            self.rejections.labels("unauthenticated").inc()
            log.info("metrics UNAUTHENTICATED", extra={"peer": environ.get("REMOTE_ADDR", "")})
            begin("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
            return [b"no valid token\n"]

        kind = _ServerV6 if ":" in host else _Server
        server = make_server(host, port, answer, kind, _Handler)
        if context is not None:
            # Each connection's thread does its handshake, so that a slow client blocks no
            # other.
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        return server, thread


class _Callers(Collector):
    """What callers have running and waiting, at the time of a scrape."""

    def __init__(self, metrics: Metrics, scheduler: Scheduler) -> None:
        self._metrics, self._scheduler = metrics, scheduler

    def collect(self) -> Iterator[Metric]:
        running: Counts[str] = Counts({OTHER: 0})
        waiting: Counts[str] = Counts({OTHER: 0})
        for name, slots, others in self._scheduler.jobs.by_caller():
            label = self._metrics.caller(name)
            running[label] += slots
            waiting[label] += others
        for kind, counts in (("running", running), ("waiting", waiting)):
            family = GaugeMetricFamily(
                f"gpt_dist_caller_{kind}",
                f"Sequences that are {kind}, by caller",
                labels=["caller"],
            )
            for label, count in counts.items():
                family.add_metric([label], count)
            yield family
        text = "How many times a sequence has lost its slot to another caller's"
        yield CounterMetricFamily("gpt_dist_preemptions", text, self._scheduler.slots.preempted)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Ignore broken connections and clients without TLS."""


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10.0

    def log_message(self, *_: Any) -> None:
        """Do not log scrapes."""
