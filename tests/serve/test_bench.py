"""The load generator: its figures by hand, and with a live server."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from gpt_dist.errors import UsageError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1.generation_service_pb2 import GenerateStreamResponse
from serve.bench import lengths, main, percentile, read_trace, report
from serve.requests import Record, ask
from tests.serve.conftest import HeldDecoder, StartServer


def test_percentiles_equal_numpys() -> None:
    draw = random.Random(0)
    for count in (1, 2, 7, 100):
        values = [draw.random() for _ in range(count)]
        for percent in (0, 50, 90, 99, 100):
            assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert math.isnan(percentile([], 50))


def test_lengths() -> None:
    draw = random.Random(0)
    assert lengths("64")(draw) == 64
    uniform = [lengths("uniform:3,5")(draw) for _ in range(100)]
    assert set(uniform) == {3, 4, 5}
    normal = [lengths("normal:50,10")(draw) for _ in range(2000)]
    assert np.mean(normal) == pytest.approx(50, abs=1)
    assert np.std(normal) == pytest.approx(10, abs=1)
    for wrong in ("0", "x", "uniform:5,3", "normal:1", "gamma:1,2", "uniform:a,b"):
        with pytest.raises(argparse.ArgumentTypeError):
            lengths(wrong)


def test_report() -> None:
    records = [Record(3, 0.1, [0.02, 0.04], 0.2), Record(2, 0.3, [0.03], 0.4), Record(error="X")]
    figures = report(records, 2.0)
    assert (figures["completed"], figures["errors"]) == (2, {"X": 1})
    assert figures["tokens_per_second"] == 2.5
    assert figures["time_to_first_token_ms"]["p50"] == 200
    assert figures["inter_token_ms"]["mean"] == 30


def test_times_of_a_request() -> None:
    """With a clock that advances only during these waits."""
    now = [100.0]

    class Slow:
        async def stream(self, *_: object, **__: object) -> AsyncIterator[GenerateStreamResponse]:
            for wait, count in ((0.5, 2), (0.3, 3), (0.1, 0), (0.2, 1)):
                now[0] += wait
                yield GenerateStreamResponse(token_ids=[1] * count)
            now[0] += 0.05

    record = asyncio.run(ask(Slow(), [1], 6, {}, clock=lambda: now[0]))  # type: ignore[arg-type]
    assert (record.tokens, record.error) == (6, "")
    assert record.first == pytest.approx(0.5)
    assert record.gaps == pytest.approx([0, 0.1, 0.1, 0.1, 0.3])
    assert record.total == pytest.approx(1.15)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [["--concurrency", "4"], ["--rate", "100"]])
def test_against_a_server(
    start: StartServer,
    model: GPT,
    shape: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every step takes at least 5 ms, and so every request at least 80 ms."""
    server = start(HeldDecoder(Decoder(model, max_slots=4, dtype="fp32"), pause=0.005))
    result, picture = tmp_path / "result.json", tmp_path / "result.png"
    arguments = [
        "--target", server.target, "--requests", "12", "--prompt-tokens", "uniform:4,30",
        "--new-tokens", "16", "--json", str(result), "--plot", str(picture), *shape,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert main() == 0
    figures = json.loads(result.read_text())
    assert (figures["completed"], figures["errors"]) == (12, {})
    assert figures["tokens"] == 12 * 16
    assert 0 < figures["time_to_first_token_ms"]["p50"] < figures["end_to_end_ms"]["p50"]
    assert figures["inter_token_ms"]["mean"] > 0
    assert figures["end_to_end_ms"]["p50"] > 16 * 5
    assert picture.stat().st_size > 10_000


def test_prompts_from_a_file(
    start: StartServer, model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(Decoder(model, max_slots=4, dtype="fp32"))
    path = tmp_path / "prompts.txt"
    path.write_text("to be\n\nor not\n")
    arguments = ["--target", server.target, "--requests", "5", "--prompts", str(path)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert main() == 0
    path.write_text("\n")
    with pytest.raises(UsageError, match="no line"):
        main()


def test_a_trace_over_http(
    start: StartServer, model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(Decoder(model, max_slots=4, dtype="fp32"), http_port=0)
    trace, result = tmp_path / "trace.jsonl", tmp_path / "result.json"
    rows = [{"at": 0.02 * n, "prompt_tokens": 5, "new_tokens": 3 + n} for n in range(4)]
    rows.append({"at": 0, "prompt": "to be", "new_tokens": 5})
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    address = f"http://127.0.0.1:{server.server.http_port}/v1"
    arguments = ["bench", "--http", address, "--trace", str(trace), "--json", str(result)]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    figures = json.loads(result.read_text())
    assert (figures["requests"], figures["completed"], figures["errors"]) == (5, 5, {})
    assert figures["tokens"] == 3 + 4 + 5 + 6 + 5
    assert figures["seconds"] >= 0.06
    assert figures["end_to_end_ms"]["p50"] >= figures["time_to_first_token_ms"]["p50"] > 0
    monkeypatch.setattr("sys.argv", [*arguments, "--model", "other"])
    assert main() == 1
    assert json.loads(result.read_text())["errors"] == {"404": 5}


@pytest.mark.parametrize(
    "line",
    ["x", "[]", '{"at": 1, "prompt": "a"}', '{"at": -1, "prompt": "a", "new_tokens": 1}',
     '{"at": 1, "prompt_tokens": 0, "new_tokens": 1}',
     '{"at": NaN, "prompt": "a", "new_tokens": 1}'],
)  # fmt: skip
def test_a_bad_trace_is_one_clear_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 0, "prompt": "a", "new_tokens": 1}\n\n' + line)
    with pytest.raises(UsageError, match="line 3: must be like"):
        read_trace(path, 9, random.Random(0))
    path.write_text("\n")
    with pytest.raises(UsageError, match="contains no request"):
        read_trace(path, 9, random.Random(0))
