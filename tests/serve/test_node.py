"""The JavaScript example against a live server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.client import Client
from tests.serve.conftest import SlowDecoder, StartServer

NODE = Path(__file__).parents[2] / "examples/node"
pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def node() -> list[str]:
    """The command of the example, its packages installed as the lock file says."""
    npm, binary = shutil.which("npm"), shutil.which("node")
    if npm is None or binary is None:
        if os.environ.get("CI"):
            pytest.fail("Node.js is missing")
        pytest.skip("needs Node.js")
    if not (NODE / "node_modules/@grpc/grpc-js").exists():
        done = subprocess.run(
            [npm, "install", "--no-audit", "--no-package-lock"],
            cwd=NODE,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            if os.environ.get("CI"):
                pytest.fail(done.stderr)
            pytest.skip(f"npm could not install the example's packages: {done.stderr[-200:]}")
    return [binary, str(NODE / "client.js")]


def test_the_example(node: list[str], start: StartServer, model: GPT) -> None:
    slow = SlowDecoder(Decoder(model, max_slots=4, dtype="fp32"), 0.002)
    server = start(slow)
    arguments = ["to be", "--target", server.target, "--seed", str(2**63 + 5)]
    arguments += ["--max-new-tokens", "20"]
    with Client(server.target) as client:
        expected = client.generate("to be", n=2, seed=2**63 + 5, max_new_tokens=20)
    plain = subprocess.run([*node, *arguments], capture_output=True, text=True, timeout=60)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == expected.outputs[0].text + "\n"
    many = subprocess.run(
        [*node, *arguments, "--n", "2", "--json"], capture_output=True, text=True, timeout=60
    )
    pieces = [json.loads(line) for line in many.stdout.split("\n")[:-1]]
    for output in expected.outputs:
        mine = [piece for piece in pieces if piece["index"] == output.index]
        assert "".join(piece["text_delta"] for piece in mine) == output.text
        assert mine[0]["started"]["seed"] == str(2**63 + 5)
        assert mine[-1]["finished"]["finish_reason"].startswith("FINISH_REASON_")


def test_errors_and_cancellation(node: list[str], start: StartServer, model: GPT) -> None:
    server = start(SlowDecoder(Decoder(model, max_slots=4, dtype="fp32"), 0.02))
    wrong = subprocess.run(
        [*node, "x", "--target", server.target, "--n", "0"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert wrong.returncode == 1
    assert "INVALID_ARGUMENT: sampling.n" in wrong.stderr
    process = subprocess.Popen(
        [*node, "x", "--target", server.target, "--max-new-tokens", "150"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not server.scheduler.running:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "CANCELLED" in errors
    assert server.at_rest()
