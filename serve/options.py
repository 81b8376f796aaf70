"""Flags of ``python -m serve``. Each is also an environment variable."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_dist.errors import Parser, UsageError, at_least

PREFIX = "GPT_DIST_SERVE_"


@dataclass(frozen=True)
class Options:
    """Settings of a server. ``--help`` explains them."""

    checkpoint: Path
    model_name: str = "gpt2"
    host: str = "127.0.0.1"
    port: int = 50051
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    max_slots: int | None = None
    max_queue: int = 256
    caller_running: int | None = None
    caller_waiting: int | None = None
    max_context: int | None = None
    prefill_chunk: int | None = None
    deterministic: bool = False
    speculate: str = "auto"
    shared_prefix_cache: bool = False
    watch: bool = False
    watch_interval: float = 5.0
    grace: float = 30.0
    stall_seconds: float = 30.0
    stream_interval: float = 0.05
    max_message_bytes: int = 1 << 19
    max_calls: int = 1024
    max_connection_age: float = 30.0
    http_port: int | None = None
    cors_origins: tuple[str, ...] = ()
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    auth_token_file: Path | None = None
    allow_anonymous: bool = False
    allow_insecure: bool = False
    kserve: bool = False
    log_format: str = "plain"
    log_level: str = "info"
    trace: bool = False


PORT = at_least(0, int, 65535)


def origins(text: str) -> tuple[str, ...]:
    """Origins of web pages, between commas."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in found:
        if not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise argparse.ArgumentTypeError(f"{origin}: must be like https://a.example:8443")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="python -m serve",
        description="Serve a model over gRPC (gpt_dist.v1.GenerationService), and over HTTP.",
        epilog="""examples:
  python -m serve --checkpoint runs/mine
  python -m serve --checkpoint runs/mine --watch --metrics-port 9090
  python -m serve --checkpoint runs/mine --http-port 8000    # for OpenAI's clients and curl
  python -m serve --checkpoint exported/ --host 0.0.0.0 --tls-cert c.pem --tls-key k.pem \\
      --auth-token-file tokens.txt

Then: python -m serve.client generate "Once upon a time" --stream""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(group: Any, name: str, text: str, **options: Any) -> None:
        variable = PREFIX + name.upper().replace("-", "_")
        default = getattr(Options, name.replace("-", "_"), None)
        shown = "" if default in (None, False) else f", default {default}"
        group.add_argument(f"--{name}", help=f"{text} ({variable}{shown})", default=None, **options)

    on = {"action": argparse.BooleanOptionalAction}
    count = {"type": at_least(1, int), "metavar": "N"}
    seconds = {"type": at_least(0, float), "metavar": "SECONDS"}
    path = {"type": Path, "metavar": "FILE"}

    model = made.add_argument_group("model")
    add(model, "checkpoint", "run, checkpoint or exported model; required",
        type=Path, metavar="PATH")  # fmt: skip
    add(model, "model-name", "name of the model in responses", metavar="NAME")
    add(model, "watch", "follow a training run: load each new checkpoint", **on)
    add(model, "watch-interval", "how often to look for a new checkpoint", **seconds)

    engine = made.add_argument_group("engine")
    add(engine, "device", "auto, cpu, cuda or cuda:N", metavar="DEVICE")
    add(engine, "dtype", "of the weights; auto is bf16 where that is faster, else fp32",
        choices=("auto", "fp32", "bf16", "int8"))  # fmt: skip
    add(engine, "threads", "CPU threads; default: all", **count)
    add(
        engine, "max-slots", "maximum number of sequences at once; default: 32, on CUDA 64", **count
    )
    add(
        engine,
        "max-queue",
        "maximum number of waiting sequences",
        type=at_least(0, int),
        metavar="N",
    )
    add(
        engine, "caller-running", "maximum number of sequences at once of one caller; default: all",
        **count,
    )  # fmt: skip
    add(
        engine, "caller-waiting",
        "maximum number of waiting sequences of one caller; default: --max-queue, as long as "
        "others leave room",
        type=at_least(0, int), metavar="N",
    )  # fmt: skip
    add(engine, "max-context", "maximum tokens of prompt and output; default: the model's", **count)
    add(engine, "prefill-chunk", "maximum prompt tokens between two steps; default: 256, CUDA 512",
        **count)  # fmt: skip
    add(engine, "deterministic", "same tokens for a seed, whatever else runs (slower)", **on)

    add(engine, "shared-prefix-cache",
        "reuse what any caller's prompt has cached, not only the same caller's: faster, but "
        "callers can find out each other's prompts", **on)  # fmt: skip
    add(engine, "speculate", "auto guesses tokens from earlier text where that is faster",
        choices=("auto", "off"))  # fmt: skip

    network = made.add_argument_group("network")
    add(network, "host", "address to listen on", metavar="ADDRESS")
    add(network, "port", "0 picks a free one", type=PORT, metavar="N")
    add(network, "allow-anonymous", "allow anonymous callers (requires TLS)", **on)
    add(network, "allow-insecure", "trust the network: any --host without TLS", **on)
    add(network, "tls-cert", "certificate chain (PEM)", **path)
    add(network, "tls-key", "its private key (PEM)", **path)
    add(network, "tls-ca", "require client certificates from these authorities (PEM)", **path)
    add(
        network,
        "auth-token-file",
        "require one of these bearer tokens, one per line; name=, weight=, "
        "running= and waiting= may follow",
        **path,
    )
    add(network, "http-port", "serve HTTP too, as OpenAI's clients expect it; 0 picks a free port; "
        "default: off", type=PORT, metavar="N")  # fmt: skip
    add(network, "cors-origins", "origins of web pages that may call over HTTP, with commas, such "
        "as https://a.example; default: none", type=origins, metavar="URLS")  # fmt: skip
    add(
        network,
        "max-message-bytes",
        "maximum size of a request; the served model may need less, which is the maximum then",
        **count,
    )
    add(network, "max-calls", "maximum number of open calls", **count)
    add(network, "max-connection-age",
        "close connections gracefully after this time, so that new replicas get calls; 0: never",
        **seconds)  # fmt: skip
    add(
        network,
        "stream-interval",
        "minimum time between two messages of a stream; 0 sends every token at once",
        **seconds,
    )
    add(network, "kserve", "also serve the Open Inference Protocol", **on)

    running = made.add_argument_group("operation")
    add(running, "grace", "on SIGTERM, time for accepted calls to finish", **seconds)
    add(running, "stall-seconds", "report NOT_SERVING after this long without progress", **seconds)
    add(running, "metrics-port", "serve Prometheus metrics; 0 picks a free port; default: off",
        type=PORT, metavar="N")  # fmt: skip
    add(running, "metrics-host", "address for the metrics", metavar="ADDRESS")
    add(running, "log-format", "format of the log on stderr", choices=("plain", "json"))
    add(running, "log-level", "lowest level to log", choices=("debug", "info", "warning", "error"))
    add(running, "trace", "send OpenTelemetry spans of all calls where OTEL_EXPORTER_OTLP_ENDPOINT "
        "says; needs gpt_dist[tracing]", **on)  # fmt: skip
    return made


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line. It overrides the environment, which overrides the defaults.

    Raises:
        UsageError: a required setting is missing, or two settings contradict each other.
        SystemExit: argparse found another error.
    """
    made = parser()
    given = vars(made.parse_args(arguments))
    for action in made._actions:
        text = os.environ.get(PREFIX + action.dest.upper())
        if action.dest in given and given[action.dest] is None and text is not None:
            given[action.dest] = _from_environment(action, text)
    values = {name: value for name, value in given.items() if value is not None}
    if "checkpoint" not in values:
        raise UsageError("--checkpoint is required: a run, checkpoint or exported model directory")
    options = Options(**values)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError("--tls-cert and --tls-key must be given together")
    if options.tls_ca is not None and options.tls_cert is None:
        raise UsageError("--tls-ca requires --tls-cert and --tls-key")
    if options.cors_origins and options.http_port is None:
        raise UsageError("--cors-origins requires --http-port")
    return options


def _from_environment(action: argparse.Action, text: str) -> Any:
    name = PREFIX + action.dest.upper()
    if isinstance(action, argparse.BooleanOptionalAction):
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in words:
            raise UsageError(f"{name}={text}: must be 1 or 0")
        return words[text.lower()]
    try:
        value = action.type(text) if callable(action.type) else text
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{name}={text}: {error}") from None
    if action.choices and value not in action.choices:
        raise UsageError(f"{name}={text}: must be one of {', '.join(action.choices)}")
    return value
