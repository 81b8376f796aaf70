"""The metrics of a server, as Prometheus scrapes them."""

from __future__ import annotations

import urllib.request

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.inference.speculation import StepTimes
from gpt_dist.model.gpt import GPT
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.client import Client, build_request
from tests.serve.conftest import HeldDecoder, LiveServer, StartServer, wait_until


def scrape(server: LiveServer) -> dict[tuple[str, ...], float]:
    url = f"http://127.0.0.1:{server.server.metrics_port}/metrics"
    text = urllib.request.urlopen(url).read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_match_what_was_sent(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(decoder, metrics_port=0, max_queue=1)
    method = "gpt_dist.v1.GenerationService/Generate"

    def counted(code: str, count: int) -> None:
        """Wait until calls are counted. A failed call is counted after its caller knows."""
        wait_until(lambda: scrape(server).get(("gpt_dist_calls_total", code, method)) == count)

    with Client(server.target) as client:
        for _ in range(3):
            client.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True, n=2)
        list(client.stream([1], temperature=0, stop_token_ids=[7], logit_bias={7: 1000}))
        with pytest.raises(grpc.RpcError):
            client.generate([1], temperature=-1)
        decoder.hold()
        request = build_request([1] * 9, max_new_tokens=50, ignore_eos=True)
        calls = [client._stub.Generate.future(request) for _ in range(3)]
        wait_until(lambda: len(server.scheduler.jobs) == 3)
        with grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
            with pytest.raises(grpc.RpcError):
                GenerationServiceStub(channel).Generate(request)
        decoder.allow(4)  # two prompts, two steps
        wait_until(lambda: decoder.held and len(server.scheduler.slots.running) == 2)
        counted("OK", 3)
        counted("INVALID_ARGUMENT", 1)
        counted("RESOURCE_EXHAUSTED", 1)
        values = scrape(server)
        assert values["gpt_dist_rejections_total", "queue_full"] == 1
        assert values["gpt_dist_finished_total", "length"] == 6
        assert values["gpt_dist_finished_total", "stop_token"] == 1
        assert values["gpt_dist_generated_tokens_total",] == 30
        assert values["gpt_dist_prompt_tokens_total",] == 3 * 3 + 1 + 3 * 9
        assert values["gpt_dist_call_seconds_count", method] == 5
        assert (values["gpt_dist_running",], values["gpt_dist_waiting",]) == (2, 1)
        assert (values["gpt_dist_slots",], values["gpt_dist_queue_limit",]) == (2, 1)
        assert values["gpt_dist_kv_capacity_tokens",] == 2 * 160
        assert 2 * 8 <= values["gpt_dist_kv_tokens",] <= 2 * 12
        assert values["gpt_dist_time_to_first_token_seconds_count",] >= 6
        assert values["gpt_dist_inter_token_seconds_count",] >= 6 * 4
        for call in calls:
            call.cancel()
        decoder.release()
        server.wait_at_rest()
        counted("CANCELLED", 3)
        values = scrape(server)
        assert values["gpt_dist_cancelled_total",] == 3
        assert values["gpt_dist_running",] == values["gpt_dist_waiting",] == 0


def test_guessed_tokens_are_counted(
    start: StartServer, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that repeats, for a caller with a token and for others."""
    monkeypatch.setattr(StepTimes, "estimate", lambda self, rows: np.ones(rows + 1))
    plain = Decoder(model, max_slots=1, dtype="fp32")
    server = start(Decoder(model, max_slots=1, dtype="fp32", speculate=True), metrics_port=0)
    prompt = [5, 6, 7, 8] * 3
    request = build_request(prompt, temperature=0, max_new_tokens=60, ignore_eos=True)
    expected = list(generate(plain, prompt, SamplingParams(temperature=0), 60))
    drafted = accepted = 0
    with grpc.insecure_channel(server.target) as channel:
        stub = GenerationServiceStub(channel)
        by_caller = []
        for token in ("one", "one", "other"):
            reply = stub.Generate(request, metadata=(("authorization", f"Bearer {token}"),))
            assert list(reply.outputs[0].token_ids) == expected
            usage = reply.usage
            assert usage.accepted_tokens <= min(usage.drafted_tokens, 60)
            drafted, accepted = drafted + usage.drafted_tokens, accepted + usage.accepted_tokens
            by_caller.append(usage.accepted_tokens)
        [finished] = [m.finished for m in stub.GenerateStream(request) if m.HasField("finished")]
    # Only a second call of the same caller knows the text from the first.
    assert by_caller.pop(1) > 10 + 2 * max(by_caller)
    values = scrape(server)
    assert values["gpt_dist_accepted_tokens_total",] == accepted + finished.usage.accepted_tokens
    assert values["gpt_dist_drafted_tokens_total",] == drafted + finished.usage.drafted_tokens
