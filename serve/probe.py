"""``python -m serve.probe``: whether the server of this container is healthy.

Host, port and TLS settings are read from the server's own command line and environment. A container
that runs another command is healthy as long as it runs.
"""

from __future__ import annotations

import argparse
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gpt_dist.errors import GptDistError, Parser, at_least, run_main
from serve.options import PREFIX, Options, parse

PROC = Path("/proc")
ANY = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
"""Wildcard addresses, and the loopback address to connect to instead."""


def find_server() -> int | None:
    """The first process that runs ``python -m serve``; None if there is none."""
    numbers = sorted(int(path.name) for path in PROC.iterdir() if path.name.isdecimal())
    return next((number for number in numbers if _arguments(number) is not None), None)


def _arguments(number: int) -> list[str] | None:
    """The arguments after ``-m serve`` of a process."""
    try:
        words = (PROC / str(number) / "cmdline").read_bytes().decode().split("\0")[:-1]
    except (OSError, UnicodeDecodeError):
        return None
    for index in range(len(words) - 1):
        if words[index : index + 2] == ["-m", "serve"]:
            return words[index + 2 :]
    return None


def options_of(number: int) -> Options:
    """The options of a running server.

    Raises:
        GptDistError: the process is no server, or belongs to another user.
    """
    arguments = _arguments(number)
    if arguments is None:
        raise GptDistError(f"process {number} does not run python -m serve")
    try:
        entries = (PROC / str(number) / "environ").read_bytes().decode().split("\0")
    except OSError as error:
        raise GptDistError(f"process {number}: {error.strerror}") from None
    given = dict(entry.partition("=")[::2] for entry in entries if entry.startswith(PREFIX))
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    os.environ.update(given)
    return parse(arguments)


def healthy(options: Options, timeout: float) -> bool:
    """Whether the server reports SERVING.

    Raises:
        GptDistError: its port is unknown.
        OSError: it cannot be reached.
    """
    if not options.port:
        raise GptDistError("the server runs with --port 0; give it a fixed port")
    host = ANY.get(options.host, options.host)
    target = f"[{host}]:{options.port}" if ":" in host else f"{host}:{options.port}"
    if options.tls_cert is None or options.tls_key is None:
        channel = grpc.insecure_channel(target)
    else:
        # The certificate names the public host, not loopback. Trust exactly this certificate.
        cert, key = options.tls_cert.read_bytes(), options.tls_key.read_bytes()
        client = (key, cert) if options.tls_ca is not None else (None, None)
        name = ("grpc.ssl_target_name_override", _name(options, host, timeout))
        credentials = grpc.ssl_channel_credentials(cert, *client)
        channel = grpc.secure_channel(target, credentials, [name])
    stub: Any = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
    try:
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    except grpc.RpcError as error:
        if options.tls_ca is None:
            raise GptDistError(f"{target}: {error.details()}") from None
        print(
            f"{target} answers the TLS handshake, but --tls-ca does not accept the server's own "
            "certificate: its health is unknown"
        )
        return True
    finally:
        channel.close()
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _name(options: Options, host: str, timeout: float) -> str:
    """A name that the server's certificate is for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(options.tls_cert)
    if options.tls_ca is not None and options.tls_cert is not None:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, options.port), timeout) as connection,
        context.wrap_socket(connection) as encrypted,
    ):
        certificate = encrypted.getpeercert() or {}
    names: Any = certificate.get("subjectAltName", ())
    found = [name for kind, name in names if kind in ("DNS", "IP Address")]
    return found[0].replace("*", "any", 1) if found else host


def main(argv: list[str] | None = None) -> int:
    """Ask, and print the state; returns 0 if the server is healthy, else 1.

    Raises:
        GptDistError: the server cannot be asked.
    """
    parser: argparse.ArgumentParser = Parser(
        prog="python -m serve.probe", description="Exit with status 0 if the local server serves."
    )
    parser.add_argument("--pid", type=int, metavar="N", help="its process; default: the first one")
    parser.add_argument("--timeout", type=at_least(0.001, float), default=4.0, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    number = arguments.pid or find_server()
    if number is None:
        return 0
    serving = healthy(options_of(number), arguments.timeout)
    print("SERVING" if serving else "NOT_SERVING")
    return 0 if serving else 1


if __name__ == "__main__":
    run_main(main)
