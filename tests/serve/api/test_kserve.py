"""The Open Inference Protocol, with the real tritonclient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.inference import grpc_service_pb2 as pb
from tests.serve.conftest import PATIENCE, HeldDecoder, StartServer


@pytest.mark.slow
def test_tritonclient(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=4, dtype="fp32"), kserve=True)
    script = Path(__file__).with_name("triton_client.py")
    done = subprocess.run(
        [sys.executable, script, server.target], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    server.wait_at_rest()
    # Every field of our .proto file has the number of tritonclient's.
    theirs = json.loads(done.stdout)
    ours: dict[str, int] = {}

    def visit(message: Any) -> None:
        for field in message.fields:
            ours[field.full_name] = field.number
        for nested in message.nested_types:
            visit(nested)

    for message in pb.DESCRIPTOR.message_types_by_name.values():
        visit(message)
    assert len(ours) > 40
    assert {name: theirs.get(name) for name in ours} == ours


def streamed_request(max_tokens: int) -> bytes:
    request = pb.ModelInferRequest(model_name="gpt2")
    parameters = json.dumps({"max_tokens": max_tokens, "ignore_eos": True}).encode()
    for name, value in (("text_input", b"x"), ("sampling_parameters", parameters)):
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(len(value).to_bytes(4, "little") + value)
    request.inputs.add(name="stream", datatype="BOOL", shape=[1])
    request.raw_input_contents.append(b"\1")
    return request.SerializeToString()


def test_pieces_arrive_as_they_are_generated(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(decoder, kserve=True, stream_interval=0)
    decoder.hold()
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
            iter([streamed_request(3)])
        )
        finals = []
        for _ in range(3):
            decoder.allow(1)
            response = pb.ModelStreamInferResponse.FromString(next(call)).infer_response
            finals.append(response.parameters["triton_final_response"].bool_param)
        assert finals == [False, False, True]
        assert list(call) == []


def test_leaving_a_stream_cancels_its_requests(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=2, dtype="fp32"), kserve=True)
    request = streamed_request(150)
    for _ in range(10):
        with grpc.insecure_channel(server.target) as channel:
            call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
                iter([request] * 20)
            )
            next(call)
            call.cancel()
        server.wait_at_rest()


def test_bytes_that_are_not_a_request(start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"), kserve=True)
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
            iter([b"\xff\xff"])
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
