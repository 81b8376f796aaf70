"""Calls a server with tritonclient.

This is a separate process, because tritonclient registers the same protobuf names as the server.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import traceback

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

PATIENCE = 120.0


def tensors(text: str, parameters: dict | None = None, **flags: bool) -> list[triton.InferInput]:
    values = {"text_input": np.array([text.encode()], dtype=np.object_)}
    if parameters is not None:
        encoded = json.dumps(parameters).encode()
        values["sampling_parameters"] = np.array([encoded], dtype=np.object_)
    values |= {name: np.array([flag], dtype=bool) for name, flag in flags.items()}
    made = []
    for name, value in values.items():
        tensor = triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        tensor.set_data_from_numpy(value)
        made.append(tensor)
    return made


def text_of(result: triton.InferResult) -> list[str]:
    return [text.decode() for text in result.as_numpy("text_output")]


def main(target: str) -> None:
    client = triton.InferenceServerClient(target)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("gpt2")
    assert client.get_server_metadata().name == "gpt_dist"
    metadata = client.get_model_metadata("gpt2")
    assert metadata.inputs[0].name == "text_input"

    greedy = {"temperature": "0", "max_tokens": 20, "ignore_eos": True}
    whole = client.infer("gpt2", tensors("to be", greedy, exclude_input_in_output=True))
    [text] = text_of(whole)
    assert text
    assert text_of(client.infer("gpt2", tensors("to be", greedy))) == ["to be" + text]
    outputs = [triton.InferRequestedOutput("text_output")]
    assert text_of(client.infer("gpt2", tensors("to be", greedy), outputs=outputs)) == [
        "to be" + text
    ]
    assert len(text_of(client.infer("gpt2", tensors("to be", {"n": 3, "max_tokens": 2})))) == 3
    default = client.infer("gpt2", tensors("to be"), request_id="7")
    assert default.get_response().id == "7"

    # Two concurrent requests on one stream.
    results: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)))
    for request_id in ("a", "b"):
        client.async_stream_infer(
            "gpt2", tensors("to be", greedy, stream=True), request_id=request_id
        )
    pieces: dict[str, list[str]] = {"a": [], "b": []}
    finals = 0
    while finals < 2:
        result, error = results.get(timeout=PATIENCE)
        assert error is None, error
        response = result.get_response()
        pieces[response.id] += text_of(result)
        finals += response.parameters["triton_final_response"].bool_param
    assert {"".join(parts) for parts in pieces.values()} == {text}
    # An error is a message on the stream and does not end it.
    client.async_stream_infer("gpt2", tensors("to be", {"top_p": 5}, stream=True))
    assert "top_p" in results.get(timeout=PATIENCE)[1].message()
    client.async_stream_infer("gpt2", tensors("to be", greedy, exclude_input_in_output=True))
    assert text_of(results.get(timeout=PATIENCE)[0]) == [text]
    client.stop_stream()

    for model, inputs, word in (
        ("gpt2", tensors("x", {"temprature": 1}), "temprature"),
        ("gpt2", tensors("x", {"max_tokens": "many"}), "max_tokens"),
        ("gpt2", tensors("x", stream=True), "stream"),
        ("gpt2", tensors("x", {"seed": -1}), "seed"),
        ("gpt2", [], "text_input"),
        ("bert", tensors("x"), "bert"),
    ):
        try:
            client.infer(model, inputs)
            message = "accepted"
        except InferenceServerException as error:
            message = error.message()
        assert word in message, message

    print(json.dumps(field_numbers()))


def field_numbers() -> dict[str, int]:
    """Name → number of every field in tritonclient's descriptors."""
    found: dict[str, int] = {}

    def visit(message) -> None:
        for field in message.fields:
            found[field.full_name] = field.number
        for nested in message.nested_types:
            visit(nested)

    for message in service_pb2.DESCRIPTOR.message_types_by_name.values():
        visit(message)
    return found


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # do not wait for the thread of the client's stream
