"""What one caller can find out about another's prompts: nothing."""

from __future__ import annotations

import grpc
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1.generation_service_pb2_grpc import GenerationServiceStub
from serve.api.callers import identify
from serve.client import build_request
from tests.serve.conftest import StartServer


class Counted:
    """A decoder that counts the prompt tokens that it computes, which is what a caller can time."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.computed = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._decoder, name)

    def prefill(self, slot: int, ids: list[int], start: int = 0) -> None:
        self.computed += len(ids)
        self._decoder.prefill(slot, ids, start)


@pytest.mark.parametrize("shared", [False, True])
def test_a_cached_prompt_is_its_callers_secret(
    start: StartServer, model: GPT, shared: bool
) -> None:
    decoder = Counted(Decoder(model, max_slots=4, dtype="fp32"))
    server = start(decoder, shared_prefix_cache=shared)  # type: ignore[arg-type]
    request = build_request(list(range(1, 60)), max_new_tokens=2, ignore_eos=True)
    seen = []
    with grpc.insecure_channel(server.target) as channel:
        stub = GenerationServiceStub(channel)
        for token in ("one", "one", "other", "other", ""):
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            before = decoder.computed
            reply = stub.Generate(request, metadata=metadata)
            seen.append((reply.usage.cached_tokens, decoder.computed - before))
    fresh, known = (0, 58), (58, 0)
    if shared:
        assert seen == [fresh, known, known, known, known]
    else:
        assert seen == [fresh, known, fresh, known, fresh]


@pytest.mark.parametrize(
    ("header", "peer", "caller"),
    [
        ("", "ipv4:192.0.2.1:50000", "host 192.0.2.1"),
        ("", "192.0.2.1:8", "host 192.0.2.1"),
        ("", "ipv6:%5B2001:db8::1%5D:50000", "host 2001:db8::/64"),
        ("", "[2001:db8::ffff]:8", "host 2001:db8::/64"),
        ("", "ipv6:%5B::ffff:192.0.2.1%5D:50000", "host 192.0.2.1"),
        ("", "unix:", "host unix"),
        ("", "", "host "),
    ],
)
def test_callers_without_a_token_are_hosts(header: str, peer: str, caller: str) -> None:
    assert identify(header, peer).id == caller


def test_tokens_are_not_kept() -> None:
    one, other = identify("Bearer secret", "a:1"), identify(b"Bearer other", "a:1")
    assert one.id != other.id
    assert "secret" not in one.id
    assert one.terms == other.terms  # a token that nobody checks is worth no share of the slots
    assert identify(b"Bearer secret", "elsewhere:2").id == one.id
