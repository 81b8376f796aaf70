"""The server's life cycle: bind, load, serve, follow a training run, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from gpt_dist.errors import GptDistError, describe
from gpt_dist.v1 import generation_service_pb2 as api
from gpt_dist.v1 import model_service_pb2 as model_api
from serve.api.gate import Gate
from serve.api.kserve import InferenceService
from serve.api.rpc import UnknownMethods, generic_handler
from serve.api.served import describe_model
from serve.api.service import GenerationService, ModelService
from serve.api.serving import Serving
from serve.engine.callers import Terms
from serve.engine.engine import Engine
from serve.engine.loading import Loaded, load
from serve.engine.scheduler import Scheduler
from serve.following import Follower
from serve.health import Health
from serve.inference import grpc_service_pb2 as kserve_pb
from serve.metrics import Metrics
from serve.options import Options
from serve.security import Access, Certificates, Reloader, TokenFile, check_ports
from serve.tracing import make_tracer

if TYPE_CHECKING:
    from serve.http.listener import Listener

log = logging.getLogger("serve")

MONITOR_SECONDS = 0.25
LAST_SECONDS = 0.5
"""Time for final statuses to reach callers before the connections close."""
LONGEST_CALL = 3600.0
"""Seconds that calls may continue on a connection that has reached its maximum age."""
KEEPALIVE = [
    # Detect clients that vanished, and free their slots.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Clients may ping every few seconds. By default grpc would disconnect them.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]


class Server:
    """One gRPC server and its model.

        server = Server(options)
        await server.start()       # listens; calls get UNAVAILABLE
        await server.load()        # serves
        await server.wait()        # until stop() or a failure
        await server.drain()

    Args:
        options: settings.
        clock: the time in seconds, for deadlines, time budgets and stall detection.

    Raises:
        UsageError: a port would be exposed.
        GptDistError: the TLS files or the token file cannot be used.
    """

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self._clock = options, clock
        check_ports(options)
        self.metrics = Metrics()
        self.service = Serving(self.metrics, options.stream_interval)
        self.port = 0
        self.metrics_port: int | None = None
        self.http_port: int | None = None
        self._http: Listener | None = None
        self.engine: Engine | None = None
        self.failure: BaseException | None = None
        self._loaded: Loaded | None = None
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._close_metrics: Callable[[], None] = lambda: None
        services = [
            api.DESCRIPTOR.services_by_name["GenerationService"],
            model_api.DESCRIPTOR.services_by_name["ModelService"],
        ]
        implementations: list[object] = [
            GenerationService(self.service),
            ModelService(self.service),
        ]
        if options.kserve:
            services.append(kserve_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"])
            implementations.append(InferenceService(self.service))
        self.health = Health([service.full_name for service in services])
        services.append(health_pb2.DESCRIPTOR.services_by_name["Health"])
        implementations.append(self.health)
        services.append(reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"])
        names = [service.full_name for service in services]
        implementations.append(ReflectionServicer(names))  # type: ignore[no-untyped-call]
        self._files = Reloader()
        self.accepts: Callable[[str], bool] | None = None
        """Whether an ``authorization`` header carries a valid token; None accepts everybody."""
        find: Callable[[str], Terms | None] | None = None
        if options.auth_token_file is not None:
            tokens = TokenFile(options.auth_token_file)
            self._files.add(tokens)
            self.accepts, find = tokens.accepts, tokens.find
        self.certificates: Certificates | None = None
        if options.tls_cert is not None and options.tls_key is not None:
            self.certificates = Certificates(options.tls_cert, options.tls_key, options.tls_ca)
            self._files.add(self.certificates)
        self.gate = gate = Gate(
            self.metrics,
            find,
            usual=Terms(running=options.caller_running, waiting=options.caller_waiting),
            max_calls=options.max_calls,
            max_message_bytes=options.max_message_bytes,
        )
        if options.trace:
            gate.tracer = make_tracer()
        self._grpc = grpc.aio.server(
            options=[
                # Twice the limit. Messages up to here are refused by this server, with a reason;
                # gRPC refuses longer ones at less cost.
                ("grpc.max_receive_message_length", 2 * options.max_message_bytes),
                ("grpc.so_reuseport", 0),  # report a port in use instead of sharing it
                *KEEPALIVE,
                *_age(options.max_connection_age),
            ],
        )
        for service, implementation in zip(services, implementations, strict=True):
            handler = generic_handler(service, implementation, gate)
            self._grpc.add_generic_rpc_handlers((handler,))
        self._grpc.add_generic_rpc_handlers((UnknownMethods(gate),))
        self.metrics.gauge("open_calls", "Calls that have not ended", lambda: gate.calls)
        self.metrics.gauge("health_watches", "Open calls of health", lambda: gate.watches)

    async def start(self) -> None:
        """Listen. Until `load`, calls get UNAVAILABLE and health is NOT_SERVING.

        Raises:
            GptDistError: the port is in use, or the address is not this machine's.
        """
        options = self.options
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{options.port}"
        try:
            if self.certificates is not None:
                self.port = self._grpc.add_secure_port(address, self.certificates.credentials())
            else:
                self.port = self._grpc.add_insecure_port(address)
        except RuntimeError:
            raise GptDistError(
                f"cannot listen on {address}: the port is in use, or the address is not this "
                "machine's; choose another --port, or 0 for a free one"
            ) from None
        if options.http_port is not None:
            self._serve_http(options.http_port)
        if options.metrics_port is not None:
            self._serve_metrics(options.metrics_host, options.metrics_port)
        await self._grpc.start()

    def _serve_http(self, port: int) -> None:
        from serve.http.app import App, application
        from serve.http.listener import Listener

        context = None if self.certificates is None else self.certificates.context()
        app = application(App(self.service, self.gate, self.health), self.options.cors_origins)
        self._http = Listener(app, self.options.host, port, context)
        self.http_port = self._http.port

    def _serve_metrics(self, host: str, port: int) -> None:
        context = accepts = None
        if Access.of(self.options).guards(host) and self.certificates is not None:
            context, accepts = self.certificates.context(), self.accepts
        try:
            server, thread = self.metrics.serve(host, port, context, accepts)
        except OSError as error:
            reason = error.strerror or error
            raise GptDistError(f"cannot serve metrics on {host}:{port}: {reason}") from None
        self.metrics_port = server.server_port

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._close_metrics = close

    async def load(self) -> None:
        """Load the model and serve it.

        Raises:
            UsageError: there is no checkpoint, or an option does not fit it.
            GptDistError: the checkpoint is damaged.
        """
        loaded = await asyncio.to_thread(load, self.options)
        self.use(loaded)

    def use(self, loaded: Loaded) -> None:
        """Serve a model."""
        on_gpu = loaded.decoder.device.type == "cuda"
        scheduler = Scheduler(
            loaded.decoder,
            max_queue=self.options.max_queue,
            prefill_chunk=self.options.prefill_chunk or (512 if on_gpu else 256),
            weights_version=loaded.version,
            shared_prefixes=self.options.shared_prefix_cache,
            clock=self._clock,
        )
        self._loaded = loaded
        self.engine = Engine(scheduler, asyncio.get_running_loop(), self._failed)
        self.metrics.watch(scheduler)
        self.service.served = describe_model(loaded, self.engine, self.options.model_name)
        self.gate.max_message_bytes = min(
            self.options.max_message_bytes, self.service.served.limits.request_bytes
        )
        self._tasks.append(asyncio.create_task(self._monitor()))
        if self.options.watch:
            follower = Follower(self.options, loaded, self.engine, self.metrics, self.health)
            self._tasks.append(asyncio.create_task(follower.run()))
        self.health.set(True)

    @property
    def report(self) -> list[str]:
        """Lines about the loaded model, to print at start-up."""
        return self._loaded.report if self._loaded else []

    def stop(self) -> None:
        """Make `wait` return."""
        self._stop.set()

    async def wait(self) -> None:
        """Wait for `stop`, a signal or a failure of the engine.

        Raises:
            GptDistError: the engine failed.
        """
        await self._stop.wait()
        if self.failure is not None:
            raise GptDistError(f"the engine failed: {describe(self.failure)}")

    def handle_signals(self) -> None:
        """On SIGTERM and SIGINT, `stop`. A second signal ends `drain` at once."""
        loop = asyncio.get_running_loop()

        def received() -> None:
            if self._stop.is_set():
                self.service.idle.set()
            self.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, received)

    async def drain(self) -> bool:
        """Refuse new calls, finish accepted ones within ``grace`` seconds, and close.

        The port closes first, and clients are told to open no further calls (GOAWAY). Calls that do
        not finish get ABORTED, or UNAVAILABLE if they had not begun.

        Returns:
            Whether all accepted calls finished.
        """
        self.service.draining = True
        self.health.set(False)
        grace = 0.0 if self.failure is not None else self.options.grace
        if self.service.open_calls and grace:
            log.info("draining: %d calls are open", self.service.open_calls)
        if self.gate.watches:
            # Clients that watch health go elsewhere. grpc cancels calls that arrive at the very
            # moment at which it stops, and clients do not repeat those.
            await asyncio.sleep(LAST_SECONDS / 2)
        closing = asyncio.create_task(self._grpc.stop(grace + 10 * LAST_SECONDS))
        await self._idle(grace)
        finished = not self.service.open_calls
        if not finished:
            log.warning("%d calls are aborted", self.service.open_calls)
            if self.engine is not None:
                self.engine.shed("the server is shutting down")
            self.service.idle.clear()
            await self._idle(LAST_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.health.close()
        # Calls that have just arrived are refused, which takes a moment. Idle streams never end.
        if self.gate.tasks:
            await asyncio.wait(set(self.gate.tasks), timeout=LAST_SECONDS)
        self.gate.close()
        # Refused calls need a moment to receive their status.
        if self._http is not None:
            await self._http.close(LAST_SECONDS)
        await self._grpc.stop(LAST_SECONDS)
        await closing
        if self.engine is not None:
            await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self._close_metrics)
        self._files.close()
        if self.gate.tracer is not None:
            await asyncio.to_thread(self.gate.tracer.close)
        return finished

    async def _idle(self, seconds: float) -> None:
        """Wait until no accepted call is open, but not longer."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.service.idle.wait(), seconds)

    def _failed(self, error: BaseException) -> None:
        self.failure = error
        self.health.set(False)
        self.stop()

    async def _monitor(self) -> None:
        """Report NOT_SERVING while the engine is stalled."""
        assert self.engine is not None
        while True:
            await asyncio.sleep(MONITOR_SECONDS)
            stalled = self.engine.stalled(self.options.stall_seconds)
            if stalled and self.health.serving:
                log.error(
                    "no progress for %g s although work is waiting", self.options.stall_seconds
                )
            self.health.set(
                not stalled and not self.service.draining and self.engine.failure is None
            )


def _age(seconds: float) -> list[tuple[str, int]]:
    """gRPC options for the maximum age of connections; gRPC varies it by up to 10 %."""
    if not seconds:
        return []
    return [
        ("grpc.max_connection_age_ms", int(seconds * 1000)),
        ("grpc.max_connection_age_grace_ms", int(LONGEST_CALL * 1000)),
    ]


async def run(options: Options) -> int:
    """Serve until a signal or a failure; returns the exit status."""
    server = Server(options)
    server.handle_signals()
    await server.start()
    log.info("listening on %s:%d; loading %s", options.host, server.port, options.checkpoint)
    loading = asyncio.create_task(server.load())
    stopping = asyncio.create_task(server.wait())
    try:
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            # What was imported and loaded stays: looking through it again takes 0.3 s.
            gc.collect()
            gc.freeze()
            for line in server.report:
                print(line)
            metrics = "" if server.metrics_port is None else f", metrics on {server.metrics_port}"
            http = "" if server.http_port is None else f", HTTP on {server.http_port}"
            security = "TLS" if options.tls_cert else "no TLS"
            print(f"ready: {options.host}:{server.port} ({security}{http}{metrics})", flush=True)
            await stopping
    finally:
        stopping.cancel()
        await server.drain()
    if not loading.done():  # the loading thread cannot be interrupted
        os._exit(0)
    return 0
