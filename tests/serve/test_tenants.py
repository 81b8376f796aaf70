"""Weights, limits and priorities of callers, from the token file to the error that they get."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from gpt_dist.errors import GptDistError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.client import Client, build_request
from serve.engine.callers import Terms
from serve.engine.jobs import Sequence
from serve.security import TokenFile
from serve.tokens import parse_tokens
from tests.serve.api.conftest import details
from tests.serve.conftest import PATIENCE, HeldDecoder, LiveServer, StartServer, wait_until
from tests.serve.http.conftest import url

LINES = """
# comment
plain
search\tname=search weight=2.5
trial   name=trial running=1 waiting=0
batch   name=batch waiting=2
again   name=batch waiting=2
"""


def test_lines_of_a_token_file() -> None:
    assert parse_tokens(LINES.encode(), "tokens") == [
        (b"plain", Terms()),
        (b"search", Terms(name="search", weight=2.5)),
        (b"trial", Terms(name="trial", running=1, waiting=0)),
        (b"batch", Terms(name="batch", waiting=2)),
        (b"again", Terms(name="batch", waiting=2)),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("weight=nan", "weight=nan: must be 0.001 to 1000"),
        ("weight=0", "weight=0: must be 0.001 to 1000"),
        ("running=0", "running=0: must be a whole number from 1"),
        ("waiting=-1", "waiting=-1: must be a whole number from 0"),
        ("waiting=\u0661", "must be a whole number"),
        ("waiting=", "waiting=: must be a whole number"),
        ("name=a/b", "name=a/b: must have 1 to 64 letters"),
        ("name=", "name=: must have"),
        ("wieght=2", "wieght= after the token: valid are name=NAME, weight=NUMBER"),
        ("5", "a word without = after the token"),
        ("name=a name=b weight=x", "weight=x"),
    ],
)
def test_a_bad_line_is_one_clear_error(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"good\nsecret {line}\n")
    with pytest.raises(GptDistError) as caught:
        TokenFile(path)
    message = str(caught.value)
    assert message.startswith(f"--auth-token-file {path}, line 2: ")
    assert complaint in message
    assert "secret" not in message


def test_a_token_that_is_there_twice(tmp_path: Path) -> None:
    with pytest.raises(GptDistError, match="line 3: the token is there twice"):
        parse_tokens(b"one name=a\n\none name=b", "tokens")


@pytest.fixture(scope="module")
def decoder(model: GPT) -> HeldDecoder:
    return HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))


@pytest.fixture(scope="module")
def server(
    start: StartServer, decoder: HeldDecoder, tmp_path_factory: pytest.TempPathFactory
) -> LiveServer:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(LINES)
    return start(decoder, auth_token_file=path, http_port=0, caller_waiting=3)


def begin(server: LiveServer, token: str, count: int = 1) -> list[Any]:
    """Calls that are open, each with a slot or waiting."""
    before = len(server.scheduler.jobs)
    client = Client(server.target, token=token)
    request = build_request([1, 2], max_new_tokens=9, ignore_eos=True)
    calls = [client._stub.Generate.future(request, **client._with(None)) for _ in range(count)]
    wait_until(lambda: len(server.scheduler.jobs) == before + count)
    return calls


def refusal(call: Callable[[], object]) -> tuple[str, str, float]:
    """Reason, message and time to wait of a call that finds no room."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    found = details(caught.value)
    delay = found["RetryInfo"].retry_delay.ToMilliseconds() / 1000
    return found["ErrorInfo"].reason, caught.value.details(), delay


@pytest.mark.parametrize(
    ("token", "room", "reason", "message"),
    [
        ("trial", 1, "CALLER_RUNNING_LIMIT", "trial may have 1 running sequences"),
        ("batch", 4, "CALLER_WAITING_LIMIT", "batch may have 2 waiting sequences"),
        ("plain", 5, "CALLER_WAITING_LIMIT", "the caller may have 3 waiting sequences"),
    ],
)
def test_the_limits_of_a_caller(
    server: LiveServer, decoder: HeldDecoder, token: str, room: int, reason: str, message: str
) -> None:
    decoder.hold()
    calls = begin(server, token, room)
    other = "again" if token == "batch" else token  # the same name is the same caller
    client = Client(server.target, token=other)
    for call in (client.generate, client.score, lambda ids: list(client.stream(ids))):
        given, text, delay = refusal(lambda call=call: call([1]))  # type: ignore[misc]
        assert (given, text) == (reason, message)
        assert delay >= 0.1
    headers = {"authorization": f"Bearer {other}"}
    answer = httpx.post(
        f"{url(server)}/v1/completions", json={"prompt": "a"}, headers=headers, timeout=PATIENCE
    )
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == reason.lower()
    assert answer.json()["error"]["message"] == message
    calls += begin(server, "search", 2)  # others are not affected
    decoder.release()
    assert all(call.result(PATIENCE).usage.completion_tokens == 9 for call in calls)
    server.wait_at_rest()
    samples = server.server.metrics.registry.get_sample_value
    assert samples("gpt_dist_rejections_total", {"reason": reason.lower()})


def test_a_batch_keeps_within_its_callers_limits(server: LiveServer) -> None:
    client = Client(server.target, token="trial")
    found = list(client.batch([[1]] * 7, max_new_tokens=2))
    assert sorted(item.request_index for item in found) == list(range(7))
    assert all(item.HasField("response") for item in found)
    with pytest.raises(grpc.RpcError) as caught:
        client.generate([1], n=2)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "config.sampling.n: 2 exceeds the caller's limit, 1"


def test_metrics_and_log_name_the_caller(
    server: LiveServer, decoder: HeldDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "serve")
    value = server.server.metrics.registry.get_sample_value
    decoder.hold()
    calls = [*begin(server, "search", 2), *begin(server, "plain", 1)]

    def count(kind: str) -> list[float | None]:
        return [value(f"gpt_dist_caller_{kind}", {"caller": name}) for name in ("search", "other")]

    wait_until(lambda: decoder.held and [*count("running"), *count("waiting")] == [1, 0, 1, 1])
    decoder.release()
    for call in calls:
        call.result(PATIENCE)
    server.wait_at_rest()
    labels = {"caller": "search", "kind": "generated"}
    assert (value("gpt_dist_caller_tokens_total", labels) or 0) >= 18
    assert value("gpt_dist_caller_tokens_total", labels | {"kind": "prompt"})
    # A call is counted, and then logged, after its caller knows.
    wait_until(lambda: "search" in [getattr(each, "caller", "") for each in list(caplog.records)])
    assert value("gpt_dist_caller_calls_total", {"caller": "search", "code": "OK"})
    assert value("gpt_dist_preemptions_total") is not None


def test_labels_are_bounded(server: LiveServer) -> None:
    metrics = server.server.metrics
    labels = {metrics.caller(f"name {number}") for number in range(1000)}
    assert len(labels) <= 101
    assert "other" in labels


def test_priority_reaches_the_scheduler(server: LiveServer, decoder: HeldDecoder) -> None:
    decoder.hold()
    token = {"authorization": "Bearer plain"}
    client = Client(server.target, token="plain")
    running = begin(server, "plain", 2)
    later, sooner = (
        client._stub.Generate.future(build_request([1], priority=n), **client._with(None))
        for n in (3, -3)
    )
    wait_until(lambda: len(server.scheduler.jobs) == 4)
    jobs = [job for job in server.scheduler.jobs.all() if isinstance(job, Sequence)]
    due = {job.priority: job.due for job in jobs}
    assert due[-3] < due[3]
    decoder.release()
    for call in (*running, later, sooner):
        call.result(PATIENCE)
    path = f"{url(server)}/v1/completions"
    for priority, status in ((-10, 200), (11, 400), (1 << 40, 400)):
        body = {"prompt": "a", "max_tokens": 1, "priority": priority}
        answer = httpx.post(path, json=body, headers=token, timeout=PATIENCE)
        assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "priority"


def test_what_cannot_be_met_is_refused_at_once(server: LiveServer) -> None:
    client = Client(server.target, token="plain")
    server.scheduler.estimates.step = 1.0
    try:
        reason, message, _ = refusal(
            lambda: client.generate([1], max_new_tokens=20, ignore_eos=True, timeout=5)
        )
        assert reason == "DEADLINE_UNREACHABLE"
        assert re.match(r"the answer would take at least 10(\.\d)? s", message)
        client.generate([1], max_new_tokens=20, ignore_eos=True, timeout=PATIENCE)
    finally:
        server.scheduler.estimates.step = 0.0


def test_those_who_gave_way_are_told(start: StartServer, model: GPT, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("hog\nlight\n")
    decoder = HeldDecoder(Decoder(model, max_slots=2, dtype="fp32"))
    server = start(decoder, max_queue=3, auth_token_file=tmp_path / "tokens")
    decoder.hold()
    hog = begin(server, "hog", 5)
    wait_until(lambda: decoder.held)
    request = build_request([1], max_new_tokens=2)
    light = Client(server.target, token="light")
    served = light._stub.Generate.future(request, **light._with(None))
    wait_until(lambda: len(server.scheduler.jobs._displaced) == 1)
    decoder.release()
    assert served.result(PATIENCE).usage.completion_tokens <= 2
    # One of them was refused. The client has repeated it, and perhaps found room.
    ended = [call.exception(PATIENCE) for call in hog]
    value = server.server.metrics.registry.get_sample_value
    assert value("gpt_dist_rejections_total", {"reason": "queue_full"})
    reasons = [details(error)["ErrorInfo"].reason for error in ended if error is not None]
    assert set(reasons) <= {"QUEUE_FULL"}
    server.wait_at_rest()
