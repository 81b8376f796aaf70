"""Streams: their pieces, a slow reader, the interval between messages."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_pb2 as pb
from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.generation import Call
from serve.api.parsing import parse_generation
from serve.client import Client, build_request
from tests.serve.api.conftest import joined
from tests.serve.conftest import PATIENCE, TOKENIZER, VOCABULARY, HeldDecoder, StartServer


def test_pieces_add_up_to_the_unary_answer(client: Client) -> None:
    """For random concurrent requests with partial characters, stops and log-probabilities."""

    def check(seed: int) -> None:
        draw = random.Random(seed)
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 60))]
        options: dict[str, Any] = {"seed": seed, "n": draw.randint(1, 3), "max_new_tokens": 40}
        options["ignore_eos"] = draw.random() < 0.5
        if draw.random() < 0.4:
            options |= {"logprobs": True, "top_logprobs": 3}
        if draw.random() < 0.6:
            text = client.generate(prompt, **options).outputs[0].text
            at = draw.randrange(max(1, len(text)))
            options["stop_sequences"] = [text[at : at + draw.randint(1, 4)] or "x", "nowhere"]
        whole = client.generate(prompt, **options)
        outputs = joined(list(client.stream(prompt, **options)))
        assert [outputs[index] for index in range(options["n"])] == list(whole.outputs)
        for output in whole.outputs:
            text = TOKENIZER.decode(output.token_ids)
            if output.finish_reason == pb.FINISH_REASON_STOP_SEQUENCE:
                stop = output.stop_sequence
                assert text[len(output.text) :].startswith(stop)
                assert not any(stop in output.text for stop in options["stop_sequences"])
            else:
                assert output.text == text
            if options.get("logprobs"):
                assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(16)))


def test_a_slow_reader_gets_long_pieces_and_delays_nothing(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32", deterministic=True))
    server = start(decoder)
    options: dict[str, Any] = {"max_new_tokens": 120, "seed": 1, "ignore_eos": True, "n": 2}
    whole = Client(server.target).generate([1], **options)
    served = server.server.service.served
    assert served is not None

    async def read() -> list[api.GenerateStreamResponse]:
        """Do as the service does, with a first write that ends after the generation."""
        wanted = await parse_generation(build_request([1], **options), served.limits)
        with Call(wanted, served, server.server.metrics) as call:
            messages = call.messages()
            decoder.allow(3)
            pieces = [await anext(messages)]
            assert not any(output.finish for output in call.outputs)
            decoder.release()
            async with asyncio.timeout(PATIENCE):
                while not all(output.finish for output in call.outputs):
                    await asyncio.sleep(0.002)
            pieces += [piece async for piece in messages]
            return pieces

    decoder.hold()
    pieces = server.call(read())
    outputs = joined(pieces)
    assert [outputs[index] for index in range(2)] == list(whole.outputs)
    # Each output has at most a first and a last piece.
    assert len(pieces) <= 4
    server.wait_at_rest()


def test_stream_interval(start: StartServer, model: GPT) -> None:
    """The first and the last piece are not delayed; text between them is collected."""
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32", deterministic=True))
    options: dict[str, Any] = {"max_new_tokens": 60, "seed": 3, "ignore_eos": True}
    client = Client(start(decoder, stream_interval=1e6).target)
    decoder.hold()
    stream = client.stream([1], **options)
    decoder.allow(1)
    pieces = [next(stream)]
    assert len(pieces[0].token_ids) == 1
    decoder.release()
    pieces += list(stream)
    assert [len(piece.token_ids) for piece in pieces] == [1, 59]
    assert joined(pieces)[0] == client.generate([1], **options).outputs[0]


def test_a_piece_arrives_after_the_interval(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    client = Client(start(decoder, stream_interval=0.02).target)
    decoder.hold()
    stream = client.stream([1], max_new_tokens=60, ignore_eos=True)
    for _ in range(3):
        decoder.allow(1)
        piece = next(stream)  # would never arrive if the interval did not end
        assert (len(piece.token_ids), piece.HasField("finished")) == (1, False)
    stream.close()
