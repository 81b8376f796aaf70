"""What a server answered, in words: why an output ended, and why a call failed."""

from __future__ import annotations

import argparse
import os
from typing import Any

import grpc

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.v1 import generation_pb2 as pb
from gpt_dist.v1 import generation_service_pb2 as api
from serve.client.connection import TOKEN

STATUS_DETAILS = "grpc-status-details-bin"
"""In the trailing metadata of every error that the server itself reports."""
USAGE_CODES = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def ending(output: pb.GenerationOutput | api.GenerationFinished, tokens: int, context: int) -> str:
    """Why an output ended.

    Args:
        output: the output, or the end of its stream.
        tokens: how many it has.
        context: tokens of prompt and output that the server takes.
    """
    match output.finish_reason:
        case pb.FINISH_REASON_LENGTH:
            return f"limit of {tokens} tokens"
        case pb.FINISH_REASON_EOS:
            return "the model ended the text"
        case pb.FINISH_REASON_STOP_SEQUENCE:
            return f"stop sequence {output.stop_sequence!r}"
        case pb.FINISH_REASON_STOP_TOKEN:
            return f"stop token {output.stop_token_id}"
        case pb.FINISH_REASON_CONTEXT_FULL:
            return f"the model's context of {context} tokens is full"
        case pb.FINISH_REASON_TIME_BUDGET:
            return "the time budget is used up"
    return "unknown reason"


def failure(error: Any, target: str, *, tls: bool = False, token: bool = False) -> GptDistError:
    """A failed call as an error that says what to do.

    Args:
        error: the ``grpc.RpcError``.
        target: the server that was called.
        tls: whether the connection was to be encrypted.
        token: whether a token was sent.
    """
    code, details = error.code(), error.details() or ""
    kind = UsageError if code in USAGE_CODES else GptDistError
    if code == grpc.StatusCode.UNAUTHENTICATED:
        details = (
            "the server does not accept this token; give another --token or --token-file"
            if token
            else "the server requires a token; give --token TOKEN or --token-file FILE"
        )
    elif code == grpc.StatusCode.UNAVAILABLE:
        from_server = any(key == STATUS_DETAILS for key, _ in error.trailing_metadata() or ())
        details = f"{target}: {details}" if from_server else _unreachable(details, target, tls)
    elif code == grpc.StatusCode.DEADLINE_EXCEEDED:
        details = f"no answer from {target} in time; --timeout allows more"
    return kind(f"{code.name}: {details}")


def failure_of(error: Any, arguments: argparse.Namespace) -> GptDistError:
    """`failure` of a call that was made with the connection flags of a command line."""
    tls = any(getattr(arguments, flag, None) for flag in ("tls", "tls_ca", "tls_cert"))
    token = bool(arguments.token or arguments.token_file or os.environ.get(TOKEN))
    return failure(error, arguments.target, tls=tls, token=token)


def _unreachable(details: str, target: str, tls: bool) -> str:
    """Why there is no connection, from what gRPC reports."""
    if "WRONG_VERSION_NUMBER" in details:
        return f"the server at {target} does not use TLS; leave out --tls and --tls-ca"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            f"the certificate of the server at {target} is not trusted; "
            "name the authority that signed it with --tls-ca FILE"
        )
    if "Hostname Verification" in details:
        return f"the certificate of the server is for another name than {target}; use that name"
    if "Socket closed" in details and tls:
        return (
            f"the server at {target} ended the TLS handshake; "
            "if it requires a client certificate, give --tls-cert and --tls-key"
        )
    if "Socket closed" in details:
        return (
            f"the server at {target} closed the connection; if it uses TLS, give --tls-ca FILE "
            "(or --tls for a public certificate)"
        )
    if "address lookup failed" in details or "errors resolving" in details:
        return f"no host of this name: {target}; --target is HOST:PORT"
    if "backend unhealthy" in details:  # gRPC's words for what the health service said
        return f"the server at {target} is not ready: it is loading, stalled or shutting down"
    if "Connection refused" in details:
        return (
            f"no server answers at {target}; start one with python -m serve --checkpoint RUN, "
            "or name another with --target HOST:PORT"
        )
    return f"{target}: {details}"
