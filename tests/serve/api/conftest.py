"""A server for the tests of the API, and what they have in common."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_pb2 as pb
from gpt_dist.v1 import generation_service_pb2 as api
from serve.client import Client
from tests.serve.conftest import LiveServer, StartServer

DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
)


def details(error: grpc.RpcError) -> dict[str, Any]:
    """The google.rpc details of an error, by message name."""
    return unpacked(rpc_status.from_call(error))


def unpacked(status: Any) -> dict[str, Any]:
    """The details of a google.rpc.Status, by message name."""
    found = {}
    for packed in status.details:
        [message] = [kind() for kind in DETAILS if packed.Is(kind.DESCRIPTOR)]
        packed.Unpack(message)
        found[type(message).__name__] = message
    return found


@pytest.fixture(scope="module")
def decoder(model: GPT) -> Decoder:
    """Deterministic, so that two answers to one request are equal whoever runs beside them."""
    return Decoder(model, max_slots=8, dtype="fp32", deterministic=True)


@pytest.fixture(scope="module")
def server(start: StartServer, decoder: Decoder) -> LiveServer:
    return start(decoder)


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Client:
    return Client(server.target)


def joined(pieces: list[api.GenerateStreamResponse]) -> dict[int, pb.GenerationOutput]:
    """The outputs that a stream's messages add up to."""
    outputs: dict[int, pb.GenerationOutput] = {}
    for piece in pieces:
        first = piece.index not in outputs
        output = outputs.setdefault(piece.index, pb.GenerationOutput(index=piece.index))
        assert first == piece.HasField("started")
        assert output.finish_reason == 0, "a piece after the last one"
        output.text += piece.text_delta
        output.token_ids.extend(piece.token_ids)
        output.logprobs.extend(piece.logprobs)
        if piece.HasField("finished"):
            output.finish_reason = piece.finished.finish_reason
            if stop := piece.finished.WhichOneof("stop"):
                setattr(output, stop, getattr(piece.finished, stop))
    return outputs
