"""The JavaScript example with a live server."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.client import Client
from tests.components import require
from tests.serve.conftest import NODE, PATIENCE, HeldDecoder, StartServer, node_package, wait_until

pytestmark = [pytest.mark.node, pytest.mark.slow]


@pytest.fixture(scope="module")
def node() -> list[str]:
    """The command that starts the example."""
    binary = require("node")
    node_package("@grpc/grpc-js")
    return [binary, str(NODE / "client.js")]


def test_the_example(node: list[str], start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=4, dtype="fp32", deterministic=True))
    arguments = ["to be", "--target", server.target, "--seed", str(2**63 + 5)]
    arguments += ["--max-new-tokens", "20"]
    with Client(server.target) as client:
        expected = client.generate("to be", n=2, seed=2**63 + 5, max_new_tokens=20)
    plain = subprocess.run([*node, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == expected.outputs[0].text + "\n"
    many = subprocess.run(
        [*node, *arguments, "--n", "2", "--json"], capture_output=True, text=True, timeout=PATIENCE
    )
    pieces = [json.loads(line) for line in many.stdout.split("\n")[:-1]]
    for output in expected.outputs:
        mine = [piece for piece in pieces if piece["index"] == output.index]
        assert "".join(piece["text_delta"] for piece in mine) == output.text
        assert mine[0]["started"]["seed"] == str(2**63 + 5)
        assert mine[-1]["finished"]["finish_reason"].startswith("FINISH_REASON_")


def test_errors_and_cancellation(node: list[str], start: StartServer, model: GPT) -> None:
    decoder = HeldDecoder(Decoder(model, max_slots=4, dtype="fp32"))
    server = start(decoder)
    wrong = subprocess.run(
        [*node, "x", "--target", server.target, "--n", "0"],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert wrong.returncode == 1
    assert "INVALID_ARGUMENT: config.sampling.n" in wrong.stderr
    decoder.hold()
    process = subprocess.Popen(
        [*node, "x", "--target", server.target, "--max-new-tokens", "150"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: len(server.scheduler.jobs))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "CANCELLED" in errors
    decoder.release()
    server.wait_at_rest()
