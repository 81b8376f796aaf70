"""The Python client: its deadline, and which calls it repeats."""

from __future__ import annotations

import grpc
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.api.service import Served
from serve.api.status import StatusError, overloaded, unavailable
from serve.client import Client
from tests.serve.conftest import HeldDecoder, StartServer


def test_the_client_has_a_deadline(start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=1, dtype="fp32"))
    server = start(decoder)
    decoder.hold()
    with pytest.raises(grpc.RpcError) as caught:
        Client(server.target, timeout=0.3).generate([1])
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    decoder.release()
    server.wait_at_rest()


@pytest.mark.parametrize(
    ("refusal", "attempts"),
    [(unavailable("the server is shutting down", "DRAINING"), 2), (overloaded(0.1), 1)],
)
def test_the_client_repeats_only_what_was_unavailable(
    start: StartServer,
    model: GPT,
    refusal: StatusError,
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server refuses once, as during a restart."""
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    service, made = server.server.service, []
    accept = service.accept

    def refuse_once() -> Served:
        made.append(1)
        if len(made) == 1:
            raise refusal
        return accept()

    monkeypatch.setattr(service, "accept", refuse_once)
    client = Client(server.target)
    if attempts == 1:
        with pytest.raises(grpc.RpcError) as caught:
            client.generate([1], max_new_tokens=1)
        assert caught.value.code() == refusal.code
    else:
        assert client.generate([1], max_new_tokens=1).usage.completion_tokens == 1
    assert len(made) == attempts
