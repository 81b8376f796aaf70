"""A server that speaks HTTP, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.client import Client
from tests.components import Later
from tests.serve.conftest import PATIENCE, LiveServer, StartServer

if TYPE_CHECKING:
    import openai
else:
    openai = Later("openai")


def url(server: LiveServer, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{server.server.http_port}"


def openai_client(server: LiveServer, **options: Any) -> openai.OpenAI:
    """The real client. It does not repeat failed calls, unless a test wants that."""
    given = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
    return openai.OpenAI(base_url=f"{url(server)}/v1", **given)


@pytest.fixture(scope="module")
def decoder(model: GPT) -> Decoder:
    """Deterministic, so that two answers to one request are equal whoever runs beside them."""
    return Decoder(model, max_slots=8, dtype="fp32", deterministic=True)


@pytest.fixture(scope="module")
def server(start: StartServer, decoder: Decoder) -> LiveServer:
    return start(decoder, http_port=0)


@pytest.fixture(scope="module")
def grpc_client(server: LiveServer) -> Client:
    return Client(server.target)


@pytest.fixture(scope="module")
def ai(server: LiveServer) -> openai.OpenAI:
    return openai_client(server)


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url(server), timeout=PATIENCE) as client:
        yield client
