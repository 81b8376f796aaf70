"""The Open Inference Protocol (KServe v2), with the tensors of Triton's vLLM backend.

    text_input BYTES [1] · stream BOOL [1] · sampling_parameters BYTES [1], JSON ·
    exclude_input_in_output BOOL [1]  →  text_output BYTES [n]

``tritonclient`` works unchanged. As in that backend, only ``text_input`` is required, the JSON uses
vLLM's parameter names, and its values may be strings. The output begins with the input text, unless
that is excluded or the output is streamed (github.com/triton-inference-server/vllm_backend).
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.rpc import note, seconds_left
from serve.api.served import server_version
from serve.api.serving import Serving
from serve.api.status import StatusError, internal, invalid, unknown_model
from serve.inference import grpc_service_pb2 as pb

MAX_CONCURRENT = 256
"""Maximum number of requests of one stream that run at once."""
DEFAULT_MAX_TOKENS = 16  # vLLM's
INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
}

Cast = Callable[[Any], Any]


def _boolean(value: Any) -> bool:
    if str(value).lower() in ("true", "false", "0", "1"):
        return str(value).lower() in ("true", "1")
    raise ValueError(f"{value!r} is not a boolean")


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value]


# vLLM's name → part of GenerationConfig, field, conversion.
PARAMETERS: dict[str, tuple[str, str, Cast]] = {
    "n": ("sampling", "n", int),
    "temperature": ("sampling", "temperature", float),
    "top_k": ("sampling", "top_k", lambda value: max(int(value), 0)),  # vLLM disables it with -1
    "top_p": ("sampling", "top_p", float),
    "min_p": ("sampling", "min_p", float),
    "repetition_penalty": ("sampling", "repetition_penalty", float),
    "presence_penalty": ("sampling", "presence_penalty", float),
    "frequency_penalty": ("sampling", "frequency_penalty", float),
    "seed": ("sampling", "seed", int),
    "max_tokens": ("stopping", "max_new_tokens", int),
    "min_tokens": ("stopping", "min_new_tokens", int),
    "stop": ("stopping", "stop_sequences", _texts),
    "stop_token_ids": ("stopping", "stop_token_ids", lambda ids: [int(token) for token in ids]),
    "ignore_eos": ("stopping", "ignore_eos", _boolean),
    "include_stop_str_in_output": ("stopping", "include_stop_sequence", _boolean),
}


@dataclass(frozen=True)
class Wanted:
    """A parsed request."""

    text: str
    stream: bool
    exclude_input: bool
    request: api.GenerateRequest


class InferenceService:
    """Implements ``inference.GRPCInferenceService``."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    @property
    def _ready(self) -> bool:
        try:
            self.serving.accept()
        except StatusError:
            return False
        return True

    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._ready)

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Any
    ) -> pb.ModelReadyResponse:
        if self._ready:
            self._check_name(request.name)
        return pb.ModelReadyResponse(ready=self._ready)

    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="gpt_dist", version=server_version())

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Any
    ) -> pb.ModelMetadataResponse:
        self.serving.accept()
        self._check_name(request.name)
        response = pb.ModelMetadataResponse(name=request.name, versions=["1"], platform="gpt_dist")
        for name, kind in INPUTS.items():
            response.inputs.add(name=name, datatype=kind, shape=[1])
        response.outputs.add(name="text_output", datatype="BYTES", shape=[-1])
        return response

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Any
    ) -> pb.ModelInferResponse:
        self.serving.accept()
        self._check_name(request.model_name)
        wanted = understand(request)
        if wanted.stream:
            raise invalid("stream", "must be false; use ModelStreamInfer to stream")
        return await self._whole(request, wanted, context)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Run the requests of one stream concurrently. A failed one does not end the stream."""
        self.serving.accept()
        answers: asyncio.Queue[pb.ModelStreamInferResponse | StatusError | None] = asyncio.Queue(
            MAX_CONCURRENT
        )
        places = asyncio.Semaphore(MAX_CONCURRENT)
        tasks: set[asyncio.Task[None]] = set()

        async def answer(request: pb.ModelInferRequest) -> None:
            try:
                async with aclosing(self._pieces(request, context)) as pieces:
                    async for response in pieces:
                        await answers.put(pb.ModelStreamInferResponse(infer_response=response))
            except Exception as error:
                known = error if isinstance(error, StatusError) else internal()
                reply = _response(request, [], final=True)
                await answers.put(
                    pb.ModelStreamInferResponse(error_message=known.message, infer_response=reply)
                )
            finally:
                places.release()

        async def read() -> None:
            try:
                async for request in requests:
                    await places.acquire()
                    task = asyncio.create_task(answer(request))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                while tasks:
                    await asyncio.wait(tasks)
                await answers.put(None)
            except StatusError as error:  # bytes that cannot be parsed
                await answers.put(error)

        reader = asyncio.create_task(read())
        try:
            while (response := await answers.get()) is not None:
                if isinstance(response, StatusError):
                    raise response
                yield response
        finally:
            for task in (reader, *tasks):
                task.cancel()
            await asyncio.gather(reader, *tasks, return_exceptions=True)

    async def _pieces(
        self, request: pb.ModelInferRequest, context: Any
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        self._check_name(request.model_name)
        wanted = understand(request)
        if not wanted.stream:
            yield await self._whole(request, wanted, context)
            return
        served, seconds = self.serving.accept(), seconds_left(context)
        generation = self.serving.generation(served, wanted.request, seconds, whole=False)
        async with generation as call:
            left = len(call.outputs)
            try:
                async for piece in call.messages(self.serving.stream_interval):
                    left -= piece.HasField("finished")
                    texts = [""] * len(call.outputs)
                    texts[piece.index] = piece.text_delta
                    yield _response(request, texts, final=not left)
            finally:
                note(**call.notes())

    async def _whole(
        self, request: pb.ModelInferRequest, wanted: Wanted, context: Any
    ) -> pb.ModelInferResponse:
        served, seconds = self.serving.accept(), seconds_left(context)
        async with self.serving.generation(served, wanted.request, seconds) as call:
            try:
                response = await call.finished()
            finally:
                note(**call.notes())
        front = "" if wanted.exclude_input else wanted.text
        return _response(request, [front + output.text for output in response.outputs], final=True)

    def _check_name(self, name: str) -> None:
        served = self.serving.served
        if served is not None and name != served.name:
            raise unknown_model(name, served.name, "model_name")


def _response(
    request: pb.ModelInferRequest, texts: list[str], final: bool
) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(
        model_name=request.model_name, model_version="1", id=request.id
    )
    response.parameters["triton_final_response"].bool_param = final
    if texts:
        response.outputs.add(name="text_output", datatype="BYTES", shape=[len(texts)])
        encoded = [text.encode() for text in texts]
        raw = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
        response.raw_output_contents.append(raw)
    return response


def understand(request: pb.ModelInferRequest) -> Wanted:
    """Parse the tensors of a request.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    values = _tensors(request)
    if "text_input" not in values:
        raise invalid("text_input", "is required")
    text = _utf8("text_input", values["text_input"])
    stream = bool(values.get("stream", False))
    exclude = bool(values.get("exclude_input_in_output", stream))
    if stream and not exclude:
        raise invalid("exclude_input_in_output", "cannot be false when streaming")
    given = {name: _choice(value) for name, value in request.parameters.items()}
    if "sampling_parameters" in values:
        try:
            parsed = json.loads(_utf8("sampling_parameters", values["sampling_parameters"]))
        except (ValueError, RecursionError):
            raise invalid("sampling_parameters", "is not JSON") from None
        if not isinstance(parsed, dict):
            raise invalid("sampling_parameters", "is not a JSON object")
        given |= parsed
    wanted = api.GenerateRequest()
    wanted.prompt.text = text
    wanted.config.stopping.max_new_tokens = DEFAULT_MAX_TOKENS
    for name, value in given.items():
        _set(wanted, name, value)
    return Wanted(text, stream, exclude, wanted)


def _set(wanted: api.GenerateRequest, name: str, value: Any) -> None:
    if name.startswith("triton_") or name.startswith("binary_") or value is None:
        return  # addressed to the transport
    if name not in PARAMETERS:
        raise invalid(f"sampling_parameters.{name}", f"unknown; valid are {', '.join(PARAMETERS)}")
    part, field, cast = PARAMETERS[name]
    try:
        cast_value = cast(value)
        message = getattr(wanted.config, part)
        if isinstance(cast_value, list):
            getattr(message, field).extend(cast_value)
        else:
            setattr(message, field, cast_value)
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid(f"sampling_parameters.{name}", str(error)[:200]) from None


def _choice(parameter: pb.InferParameter) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def _utf8(name: str, value: Any) -> str:
    try:
        text: str = value.decode()
    except UnicodeDecodeError:
        raise invalid(name, "is not UTF-8") from None
    return text


def _tensors(request: pb.ModelInferRequest) -> dict[str, Any]:
    """Name → value of each one-element tensor: bytes or bool."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid("raw_input_contents", f"{len(raw)} entries for {len(request.inputs)} inputs")
    values: dict[str, Any] = {}
    for index, tensor in enumerate(request.inputs):
        kind = INPUTS.get(tensor.name)
        if kind is None:
            raise invalid(
                "inputs", f"unknown tensor {tensor.name[:80]!r}; valid are {', '.join(INPUTS)}"
            )
        if tensor.datatype != kind:
            raise invalid(tensor.name, f"must be {kind}")
        if any(size != 1 for size in tensor.shape):
            raise invalid(tensor.name, "must have one element")
        if raw:
            values[tensor.name] = _raw(tensor.name, kind, raw[index])
            continue
        contents = tensor.contents
        elements = contents.bytes_contents if kind == "BYTES" else contents.bool_contents
        if len(elements) != 1:
            raise invalid(tensor.name, "must have one element")
        values[tensor.name] = elements[0]
    return values


def _raw(name: str, kind: str, data: bytes) -> bytes | bool:
    if kind == "BOOL":
        if len(data) != 1:
            raise invalid(name, "must have one element")
        return data != b"\0"
    if len(data) < 4 or struct.unpack_from("<I", data)[0] != len(data) - 4:
        raise invalid(name, "must be one element, preceded by its length in four bytes")
    return data[4:]
