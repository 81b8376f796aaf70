"""The channel to a server, with the settings that both clients share."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from gpt_dist.errors import UsageError
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from gpt_dist.v1.model_service_pb2_grpc import ModelServiceStub
from serve.certificates import check_files

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 120.0
TOKEN = "GPT_DIST_TOKEN"
"""Environment variable with a bearer token."""
MAX_RESPONSE_BYTES = 64 << 20
SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:")
"""Of names that gRPC resolves by itself."""

# A call that failed with UNAVAILABLE or RESOURCE_EXHAUSTED had no effect (gRFC A6), so it is safe
# to repeat. With the latter the server says when, or that it is of no use. Other failures are left
# to the caller. Repetitions have a budget: each success earns two, so that two of three servers may
# stay full without a failed call. While most calls fail, none is repeated.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": "gpt_dist.v1.GenerationService"},
                {"service": "gpt_dist.v1.ModelService"},
            ],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 2.0},  # not 2, which gRPC misreads
    "loadBalancingConfig": [{"round_robin": {}}],
    # Servers that load, drain or stall get no calls.
    "healthCheckConfig": {"serviceName": "gpt_dist.v1.GenerationService"},
}

CHANNEL_OPTIONS = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    # Calls can be repeated as long as their request fits into this buffer.
    ("grpc.per_rpc_retry_buffer_size", 1 << 20),
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class Connection:
    """A connection, reused by all calls. Calls raise ``grpc.RpcError``.

    Args:
        target: ``host:port``, or ``dns:///name:port`` to spread calls over all addresses of a name.
        timeout: deadline of each call, in seconds. Every method can override it.
        token: bearer token. Default: that of ``token_file``, or the environment's GPT_DIST_TOKEN.
        token_file: file whose first line is the token, as the server's file has it.
        tls: encrypt, and trust the system's certificate authorities.
        tls_ca: trust these certificate authorities instead (PEM). Implies ``tls``.
        tls_cert: certificate of this client (PEM), with ``tls_key``.
        tls_key: its private key (PEM).
        request_id: sent with every call, for the server's log.
        model: name of the model that the server has to serve; empty: any. Calls that take keywords
            can override it.

    Raises:
        OSError: a file cannot be read.
        UsageError: the target is not HOST:PORT, or a file is not what it should be.
    """

    _channels: Any
    """The module that makes channels: ``grpc`` or ``grpc.aio``."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        token: str | None = None,
        token_file: Path | None = None,
        tls: bool = False,
        tls_ca: Path | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        request_id: str | None = None,
        model: str = "",
    ) -> None:
        check_target(target)
        self.timeout, self.model = timeout, model
        self.metadata = _metadata(token or read_token(token_file), request_id)
        if tls or tls_ca or tls_cert or tls_key:
            check_files(tls_cert, tls_key, tls_ca)
            credentials = grpc.ssl_channel_credentials(
                *(path.read_bytes() if path else None for path in (tls_ca, tls_key, tls_cert))
            )
            connect = partial(self._channels.secure_channel, target, credentials)
        else:
            connect = partial(self._channels.insecure_channel, target)
        self._channel = connect(CHANNEL_OPTIONS)
        # The main channel avoids unhealthy servers, so checks need their own. It connects on first
        # use.
        self._health_channel = connect([*CHANNEL_OPTIONS, ("grpc.inhibit_health_checking", 1)])
        self._stub: Any = GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._model_stub: Any = ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._health_channel)  # type: ignore[no-untyped-call]

    def _named(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, **parameters}

    def _with(self, timeout: float | None) -> dict[str, Any]:
        return {"timeout": timeout or self.timeout, "metadata": self.metadata}


def check_target(target: str) -> None:
    """Refuse an address that gRPC would take for another one: it ignores a missing port.

    Raises:
        UsageError: it is neither HOST:PORT nor a name that gRPC resolves, such as dns:///HOST:PORT.
    """
    if target.startswith(SCHEMES):
        return
    host, _, port = target.rpartition(":")
    if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UsageError(f"--target {target}: must be HOST:PORT, such as {DEFAULT_TARGET}")


def read_token(path: Path | None) -> str | None:
    """The first token of a file; without one, that of the environment.

    Raises:
        UsageError: the file contains none.
        OSError: it cannot be read.
    """
    if path is None:
        return os.environ.get(TOKEN)
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    token = next((words[0] for words in lines if words and not words[0].startswith("#")), None)
    if token is None:
        raise UsageError(f"--token-file {path}: contains no token")
    return token


def _metadata(token: str | None, request_id: str | None) -> list[tuple[str, str]]:
    made = [("authorization", f"Bearer {token}")] if token else []
    return [*made, ("x-request-id", request_id)] if request_id else made
