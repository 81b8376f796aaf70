"""The roll call: when a collective fails, the ranks that do not answer are named."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch.distributed as dist

from gpt_dist.parallel import roll_call as peers
from gpt_dist.parallel.roll_call import RollCall

GLOO = RuntimeError(
    "[/a/gloo/transport/tcp/pair.cc:5] Connection closed by peer [::1]:7. This is typically caused"
)
HOST = socket.gethostname()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(peers, "PATIENCE", 0.5)
    return server


@pytest.mark.slow(2)
def test_the_silent_rank_is_named_and_one_rank_speaks(store: Any) -> None:
    store.set("life/roll-call/host/0", "host-a")  # arrived, then died
    first, second = RollCall(1, 3, "life"), RollCall(2, 3, "life")
    errors = [first.explain(GLOO), second.explain(GLOO)]
    expected = "lost rank 0 on host-a: dead, stopped, or cut off from the network"
    for error in errors:
        assert str(error) == (
            f"{expected} (Connection closed by peer [::1]:7); run the same command to resume"
        )
    assert [error.local for error in errors] == [True, False]


def test_where_everybody_is_when_all_answer(store: Any) -> None:
    calls = [RollCall(rank, 2, "life") for rank in range(2)]
    text = str(calls[0].explain(GLOO))
    assert (
        f"all ranks answer: rank 0 on {HOST} was in a collective; rank 1 on {HOST} was in" in text
    )


@pytest.mark.slow(2)
def test_a_store_that_is_gone_is_named(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    roll_call = RollCall(0, 2, "life")
    monkeypatch.setattr(peers, "connect", threading.Event().wait)  # as behind a cut cable
    error = roll_call.explain(GLOO)
    assert f"lost the connection to {HOST} (127.0.0.1), the host of rank 0" in str(error)
    assert error.local
