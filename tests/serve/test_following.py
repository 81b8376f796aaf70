"""``--watch``: what happens to checkpoints that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_dist.errors import GptDistError
from gpt_dist.model.gpt import GPT
from serve.engine.loading import load
from serve.health import WATCH
from serve.options import Options
from tests.serve.conftest import Clock, HeldDecoder, LiveServer, tiny_model, wait_until, write_run


class Followed:
    """A server that follows a run, and looks for checkpoints when it is told to."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from serve.following import Follower

        monkeypatch.setattr(Follower, "run", lambda follower: _note(self, follower))
        self.clock = Clock()
        options = Options(run, port=0, watch=True, watch_interval=10, dtype="fp32", grace=1)
        self.follower: Any = None
        self.live = LiveServer(options, self.clock)
        self.live.call(self.live.server.load())
        wait_until(lambda: self.follower)

    def look(self, then: Callable[[], None] = lambda: None) -> str:
        """Look once, and do something; returns the version that is served then."""
        self.live.call(self.follower.look())
        then()
        wait_until(lambda: self.live.scheduler.weights.pending is False)
        return self.live.scheduler.weights.newest.rpartition("-")[0]

    def count(self, result: str) -> float:
        return float(self.live.server.metrics.reloads.labels(result)._value.get())

    @property
    def healthy(self) -> tuple[bool, bool]:
        """Health of the server, and of what it follows."""
        health = self.live.server.health
        return health.serving, health._states[WATCH]


async def _note(followed: Followed, follower: Any) -> None:
    followed.follower = follower


@pytest.fixture
def followed(tmp_path: Path, model: GPT, monkeypatch: pytest.MonkeyPatch) -> Any:
    write_run(tmp_path, model, 100)
    made = Followed(tmp_path, monkeypatch)
    yield made
    made.live.close()


def not_finite(kind: str) -> GPT:
    """A model with one bad weight, or with weights whose products overflow."""
    model = tiny_model(5)
    with torch.no_grad():
        if kind == "product":
            model.wte.weight.mul_(1e30)
        else:
            model.wpe.weight[-1, 3] = float(kind)
    return model


@pytest.mark.parametrize("kind", ["nan", "inf", "product"])
def test_weights_that_are_not_finite_are_refused(
    followed: Followed, tmp_path: Path, kind: str
) -> None:
    write_run(tmp_path, not_finite(kind), 200)
    assert followed.look() == "step-00000100"
    assert followed.healthy == (True, False)
    with pytest.raises(GptDistError, match="not finite"):  # at start too
        load(Options(tmp_path, dtype="fp32"))
    write_run(tmp_path, tiny_model(3), 300)
    assert followed.look() == "step-00000300"
    assert followed.healthy == (True, True)


def test_any_failure_is_logged_and_tried_again(
    followed: Followed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """With a growing wait. The last checkpoint of a run is not lost to a moment's failure."""
    import serve.following

    real, calls = serve.following.load_next, []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        raise RuntimeError("a moment's failure")

    monkeypatch.setattr(serve.following, "load_next", fail)
    write_run(tmp_path, tiny_model(3), 200)
    for wait, attempts in ((0, 1), (19, 1), (1, 2), (39, 2), (1, 3)):
        followed.clock.now += wait
        assert followed.look() == "step-00000100"
        assert len(calls) == attempts
    assert followed.count("failed") == 3
    assert followed.healthy == (True, False)
    lines = [record for record in caplog.records if "keeping the old" in record.getMessage()]
    assert len(lines) == 3
    assert "RuntimeError: a moment's failure" in lines[0].getMessage()
    assert lines[0].exc_info
    monkeypatch.setattr(serve.following, "load_next", real)
    followed.clock.now += 1000
    assert followed.look() == "step-00000200"
    assert (followed.count("ok"), followed.healthy) == (1, (True, True))
    registry = followed.live.server.metrics.registry
    version = followed.live.scheduler.weights.newest
    assert registry.get_sample_value("gpt_dist_weights", {"version": version}) == 1


@pytest.mark.parametrize("files", [None, [1], 5, {"model.safetensors": 5}])
def test_a_damaged_state_file_does_not_end_the_watching(
    followed: Followed, tmp_path: Path, files: Any
) -> None:
    path = write_run(tmp_path, tiny_model(3), 200)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"files": files}))
    assert followed.look() == "step-00000100"
    assert followed.count("failed") == 1
    write_run(tmp_path, tiny_model(4), 300)  # a new one is tried at once
    assert followed.look() == "step-00000300"


def test_a_run_that_vanishes_and_returns(followed: Followed, tmp_path: Path) -> None:
    write_run(tmp_path, tiny_model(3), 200)
    hidden = tmp_path.with_name("hidden")
    shutil.move(tmp_path, hidden)
    for _ in range(5):
        assert followed.look() == "step-00000100"
    assert followed.count("failed") == 1  # not once for each look
    shutil.move(hidden, tmp_path)
    assert followed.look() == "step-00000200"


def test_live_weights_are_bounded(followed: Followed, tmp_path: Path) -> None:
    """Checkpoints that come faster than sequences end are passed over."""
    from serve.client import Client, build_request

    scheduler = followed.live.scheduler
    held = HeldDecoder(scheduler.decoder)
    scheduler.decoder = held  # type: ignore[assignment]
    registry = followed.live.server.metrics.registry

    def begin(client: Client) -> Any:
        """A sequence that runs until the decoder is released."""
        before = len(scheduler.slots.running)
        request = build_request([1] * 9, max_new_tokens=100, ignore_eos=True)
        call = client._stub.Generate.future(request)
        wait_until(lambda: len(scheduler.slots.running) > before)
        return call

    def look() -> str:
        return followed.look(lambda: held.allow(1))  # new weights are used from the next step on

    with Client(followed.live.target) as client:
        held.hold()
        held.allow(2)
        first = begin(client)
        write_run(tmp_path, tiny_model(2), 200)
        assert look() == "step-00000200"
        assert registry.get_sample_value("gpt_dist_live_weights") == 2
        for step in (300, 400, 500):
            write_run(tmp_path, tiny_model(step), step)
            assert look() == "step-00000200"
            assert scheduler.weights.live == 2
        assert followed.healthy == (True, True)  # it only waits
        held.release()
        first.result(60)
        wait_until(lambda: scheduler.weights.live == 1)
        assert look() == "step-00000500"
        assert len(scheduler.weights._names) <= 2
