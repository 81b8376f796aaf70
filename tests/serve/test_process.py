"""``python -m serve`` and ``python -m serve.client`` as processes, with checkpoints on disk."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch.nn import functional as F

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.inference.generation import generate
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from serve.client import Client
from serve.engine.loading import load
from serve.options import Options, parse
from tests.serve.conftest import (
    CONTEXT,
    PATIENCE,
    TOKENIZER,
    Process,
    tiny_model,
    wait_until,
    write_run,
)

StartProcess = Callable[..., Process]
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def run(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_run(path, model)
    return path


def client_command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve.client", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=PATIENCE,
    )


@pytest.mark.slow
def test_from_start_to_sigterm(processes: StartProcess, run: Path, model: GPT) -> None:
    process = processes(
        "--checkpoint", run, "--port", 0, "--metrics-port", 0, "--dtype", "fp32",
        "--log-format", "json", "--grace", PATIENCE, "--http-port", 0,
        GPT_DIST_SERVE_MAX_SLOTS="3", GPT_DIST_SERVE_MODEL_NAME="mine",
    )  # fmt: skip
    target = process.ready()
    assert "step-00000100" in process.lines[0]
    assert "3 slots of 160 tokens" in process.lines[1]
    with grpc.insecure_channel(target) as channel:  # as kubelet and grpc_health_probe do
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        for service in ("", "gpt_dist.v1.GenerationService"):
            status = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
    with Client(target) as client:
        info = client.info()
        assert (client.status().max_slots, info.name) == (3, "mine")
        assert info.weights_version.startswith("step-00000100-")
        prompt = TOKENIZER.encode("to be")
        answer = client.generate("to be", temperature=0, max_new_tokens=9, ignore_eos=True)
        assert list(answer.outputs[0].token_ids) == list(generate(model, prompt, GREEDY, 9))
        told = re.search(r"HTTP on (\d+)", process.lines[-1])
        assert told
        with urllib.request.urlopen(f"http://127.0.0.1:{told[1]}/v1/models") as models:
            assert json.load(models)["data"][0]["id"] == "mine"

        # On SIGTERM, accepted calls finish and later ones are refused.
        answers = []

        def ask() -> None:
            with contextlib.suppress(grpc.RpcError):  # it arrived too late
                answers.append(client.generate([1], max_new_tokens=150, ignore_eos=True, n=3))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: client.status().waiting >= 3)
        status, errors = process.end()
        for thread in threads:
            thread.join()
        assert status == 0, errors
        # Calls that had not arrived were refused and are not in this list.
        assert all(answer.usage.completion_tokens == 450 for answer in answers)
    records = [json.loads(line) for line in errors.splitlines()]
    done = [record for record in records if record.get("method", "").endswith("/Generate")]
    accepted = [record for record in done if record["code"] == "OK"]
    assert len(accepted) == 1 + len(answers)
    assert all(record["request_id"] for record in done)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


def damage(path: Path, kind: str) -> str:
    """Break a checkpoint; returns a word of the expected message."""
    weights = path / "model.safetensors"
    state = json.loads((path / "state.json").read_text())
    if kind == "pickle":
        weights.write_bytes(pickle.dumps(Malicious(path / "unpickled")))
        return "model.safetensors"
    if kind == "wrong shape":
        state["config"]["model"]["n_embd"] = 64
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "model.safetensors"
    elif kind == "no tokenizer":
        (path / "tokenizer.json").unlink()
        return "tokenizer.json"
    elif kind == "other tokenizer":
        (path / "tokenizer.json").write_text("{}")
        return "tokenizer.json"
    elif kind == "no state":
        (path / "state.json").unlink()
        return str(path)
    state["files"] = {}  # so that the checksums do not fail first
    (path / "state.json").write_text(json.dumps(state))
    return "shape"


@pytest.mark.parametrize(
    "kind", ["wrong shape", "truncated", "no tokenizer", "other tokenizer", "no state"]
)
def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path, kind: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "checkpoints/step-00000100"
    word = damage(path, kind)
    with pytest.raises(GptDistError, match=word) as caught:
        load(Options(path, dtype="fp32"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_pickle_is_one_clear_line_and_never_healthy(
    processes: StartProcess, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "checkpoints/step-00000100"
    word = damage(path, "pickle")
    process = processes("--checkpoint", copy, "--port", 0)
    status, errors = process.end(None)
    assert status == 1
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert word in line
    assert "Traceback" not in errors
    assert "ready" not in errors
    assert not (path / "unpickled").exists()


@pytest.mark.slow
def test_wrong_usage_of_the_process(processes: StartProcess) -> None:
    status, errors = processes("--checkpoint", "x", "--host", "0.0.0.0").end(None)
    assert (status, errors.count("\n")) == (2, 1)
    status, errors = processes("--checkpoint", "x", "--max-slots", 0).end(None)
    assert status == 2
    assert "must be 1 or more" in errors


def test_environment_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_DIST_SERVE_CHECKPOINT", "here")
    monkeypatch.setenv("GPT_DIST_SERVE_PORT", "7")
    monkeypatch.setenv("GPT_DIST_SERVE_WATCH", "1")
    monkeypatch.setenv("GPT_DIST_SERVE_DTYPE", "int8")
    options = parse([])
    assert options == Options(Path("here"), port=7, watch=True, dtype="int8")
    assert parse(["--port", "8", "--no-watch"]) == Options(Path("here"), port=8, dtype="int8")
    for name, value, word in (
        ("WATCH", "perhaps", "must be 1 or 0"),
        ("PORT", "x", "GPT_DIST_SERVE_PORT"),
        ("PORT", "65536", "must be 0 to 65535"),
        ("DTYPE", "fp8", "must be one of auto"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"GPT_DIST_SERVE_{name}", value)
            with pytest.raises(UsageError, match=word):
                parse([])


@pytest.mark.slow
def test_watch_follows_a_run_under_load(
    processes: StartProcess, model: GPT, tmp_path: Path
) -> None:
    models = {100: model, 200: tiny_model(1), 300: tiny_model(2)}
    write_run(tmp_path, model, 100)
    process = processes(
        "--checkpoint", tmp_path, "--port", 0, "--watch", "--watch-interval", 0.1, "--dtype", "fp32"
    )
    prompt = list(range(1, 40))
    expected = {
        step: list(generate(weights, prompt, GREEDY, 30)) for step, weights in models.items()
    }
    answers: list[tuple[int, list[int]]] = []
    stop = threading.Event()

    def refusals() -> int:
        return process.log().count("keeping the old weights")

    def answered(step: int) -> bool:
        return any(answer[0] == step for answer in list(answers))

    with Client(process.ready()) as client:

        def ask() -> None:
            while not stop.is_set():
                answer = client.generate(prompt, temperature=0, max_new_tokens=30, ignore_eos=True)
                step = int(answer.weights_version.split("-")[1])
                answers.append((step, list(answer.outputs[0].token_ids)))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for step in (200, 300):
            # A broken checkpoint comes first; it is passed over.
            before = refusals()
            hidden = write_run(tmp_path / "hidden", models[step], step - 50)
            (hidden / "model.safetensors").write_bytes(b"nonsense")
            broken = tmp_path / "checkpoints" / hidden.name
            hidden.rename(broken)
            wait_until(lambda: refusals() > before)  # noqa: B023
            shutil.rmtree(broken)
            write_run(tmp_path, models[step], step)
            wait_until(lambda: answered(step))  # noqa: B023
        stop.set()
        for thread in threads:
            thread.join()
    assert {step for step, _ in answers} == {100, 200, 300}
    for step, tokens in answers:
        assert tokens == expected[step]
    assert process.end()[0] == 0


@pytest.mark.slow
def test_the_command_line_client(processes: StartProcess, run: Path, tmp_path: Path) -> None:
    process = processes("--checkpoint", run, "--port", 0, "--dtype", "fp32")
    target = ["--target", process.ready()]
    options = ["--temperature", "0", "--max-new-tokens", "12", "--ignore-eos"]
    plain = client_command("generate", "to be", *options, *target)
    assert plain.returncode == 0, plain.stderr
    streamed = client_command("generate", "to be", "--stream", *options, *target)
    assert streamed.stdout == plain.stdout
    piped = client_command("generate", *options, *target, stdin="to be")
    assert piped.stdout == plain.stdout
    whole = json.loads(
        client_command("generate", "to be", "--json", "-n", "2", *options, *target).stdout
    )
    assert whole["outputs"][0]["text"] + "\n" == plain.stdout
    pieces = client_command("generate", "to be", "--json", "--stream", *options, *target).stdout
    texts = [json.loads(line).get("text_delta", "") for line in pieces.split("\n")[:-1]]
    assert "".join(texts) + "\n" == plain.stdout
    chosen = client_command(
        "generate", "x", "--logit-bias", "33=1000", "--max-new-tokens", "2", "--json", *target
    )
    assert json.loads(chosen.stdout)["outputs"][0]["token_ids"] == [33, 33]
    ids = client_command("tokenize", "to be", *target).stdout.split()
    assert [int(token) for token in ids] == TOKENIZER.encode("to be")
    assert client_command("detokenize", *ids, *target).stdout == "to be\n"
    scored = client_command("score", "to be", "--top-logprobs", "2", *target)
    assert scored.stdout.splitlines()[-1].endswith(f"sum of {len(ids) - 1}")
    assert 'name: "gpt2"' in client_command("info", *target).stdout
    health = client_command("health", *target)
    assert (health.returncode, health.stdout) == (0, "SERVING\n")

    wrong = client_command("generate", "x", "--top-p", "7", *target)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: INVALID_ARGUMENT: config.sampling.top_p")
    process.end()
    gone = client_command("generate", "x", "--timeout", "60", *target)
    assert gone.returncode == 1
    assert "UNAVAILABLE" in gone.stderr
    assert client_command("health", *target).returncode == 1


@pytest.mark.slow
def test_ctrl_c_cancels_on_the_server(processes: StartProcess, run: Path) -> None:
    process = processes("--checkpoint", run, "--port", 0, "--log-format", "json", "--max-slots", 1)
    target = process.ready()
    for streaming in (["--stream"], []):
        # Many outputs, so that it is still running when the signal arrives.
        client = subprocess.Popen(
            [sys.executable, "-m", "serve.client", "generate", "x", "-n", "64", *streaming,
             "--max-new-tokens", "158", "--ignore-eos", "--target", target],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with Client(target) as watcher:
            wait_until(lambda: watcher.status().running)
            client.send_signal(signal.SIGINT)
            _, errors = client.communicate(timeout=PATIENCE)
            assert client.returncode == 130
            assert "Traceback" not in errors
            wait_until(lambda: not (watcher.status().running or watcher.status().waiting))
    _, errors = process.end()
    records = [json.loads(line) for line in errors.splitlines()]
    codes = [record["code"] for record in records if "/Generate" in record.get("method", "")]
    assert codes == ["CANCELLED", "CANCELLED"]


@pytest.mark.slow
def test_clients_and_help_need_no_torch() -> None:
    code = (
        "import sys, serve.client, serve.client.__main__, serve.bench, serve.__main__;"
        "heavy = ('torch', 'numpy', 'tiktoken', 'matplotlib');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_int8_prints_its_loss_difference(processes: StartProcess, run: Path, model: GPT) -> None:
    """The fp32 loss that it prints is the model's, on the same text."""
    process = processes("--checkpoint", run, "--port", 0, "--dtype", "int8")
    process.ready()
    line = next(line for line in process.lines if line.startswith("int8:"))
    found = re.search(r"loss ([\d.]+) against ([\d.]+) in fp32 \(([+-][\d.]+)\) on (\d+) tok", line)
    assert found, line
    rounded, exact, difference = map(float, found.groups()[:3])
    asset = resources.files("gpt_dist.text") / "assets" / "shakespeare.txt.gz"
    text = gzip.decompress(asset.read_bytes())[:4000].decode()
    ids = torch.tensor([TOKENIZER.encode(text)[: int(found[4])]])
    assert ids.shape[1] == CONTEXT
    with torch.no_grad():
        expected = F.cross_entropy(model(ids)[0, :-1].double(), ids[0, 1:]).item()
    assert exact == pytest.approx(expected, abs=2e-4)
    assert difference == pytest.approx(rounded - exact, abs=2e-4)
    assert 0 < abs(difference) < 0.3
