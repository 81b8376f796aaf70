"""The playground in a real browser, with a real server."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.export import export_hf
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import CharTokenizer, load_tokenizer
from serve import playground
from tests.components import require, require_module
from tests.serve.conftest import PATIENCE, wait_until

LONG = 3000


@pytest.fixture
def gradio() -> None:
    """Imported by the tests that need it, because that takes seconds."""
    require_module("gradio", "Gradio is not installed: pip install 'gpt_dist[playground]'")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose replies are long enough to be stopped."""
    torch.manual_seed(10)
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz éß\n<>&\"'")
    shape = {"n_layer": 24, "n_head": 4, "n_embd": 128, "context_length": LONG + 100}
    config = ModelConfig.model_validate(shape | {"vocab_size": tokenizer.vocab_size})
    directory = tmp_path_factory.mktemp("playground") / "model"
    export_hf(GPT(config), tokenizer, directory, torch.float32)
    return directory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(*command: str) -> Iterator[str]:
    """Run a module until the block ends; yields its line ``ready: …``."""
    # Without the fast kernels a long reply takes seconds, which leaves time to stop it.
    slow = {"OMP_NUM_THREADS": "1", "GPT_DIST_KERNELS": "0", "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | slow,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("ready:"):
                yield line
                break
        else:
            raise AssertionError(f"{command} ended with status {process.wait()}")
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[tuple[str, str]]:
    """Target and metrics address of a server."""
    options = ["--port", "0", "--metrics-port", "0", "--threads", "1", "--grace", "1"]
    with running("serve", "--checkpoint", str(model_dir), *options) as line:
        target, metrics = re.findall(r"([\d.]+:\d+)|metrics on (\d+)", line)
        yield target[0], f"http://127.0.0.1:{metrics[1]}/metrics"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = require("chromium", "chromium-browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


def gauge(metrics: str, name: str) -> float:
    text = urllib.request.urlopen(metrics, timeout=PATIENCE).read().decode()
    found = re.search(rf"^{name}(?:{{.*}})? ([\d.e+]+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def ask(page: Any, prompt: str, tokens: int) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.get_by_label("number input for Tokens").fill(str(tokens))
    page.locator("#generate").click()


@pytest.mark.slow(30)
@pytest.mark.usefixtures("gradio")
def test_streaming_and_stopping_in_a_browser(
    server: tuple[str, str], browser: Any, tmp_path: Path
) -> None:
    target, metrics = server
    port = free_port()
    with running("serve.playground", "--target", target, "--port", str(port)):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"http://127.0.0.1:{port}")
        # A short reply.
        ask(page, "a <b> & é", 20)
        replies = page.locator(".reply")
        page.get_by_text("20 tokens · length").nth(1).wait_for(timeout=1000 * PATIENCE)
        assert replies.count() == 2
        texts = [reply.locator("pre").inner_text() for reply in replies.all()]
        assert all(text.startswith("a <b> & é") and len(text) == 29 for text in texts)
        title = replies.first.locator("i").first.get_attribute("data-hint")
        assert re.match(r"'.+'  \d+\.\d%\n\n( *\d+\.\d%  '.+'\n?){5}", title), title
        # A long reply grows, and stopping it frees the slots.
        ask(page, "a", 1024)
        grown = [0]

        def grows() -> bool:
            length = page.evaluate("document.querySelector('#replies').textContent.length")
            if length > grown[-1]:
                grown.append(length)
            return len(grown) > 4

        wait_until(grows)
        assert gauge(metrics, "gpt_dist_running") == 2
        page.locator("#stop").click()
        wait_until(lambda: gauge(metrics, "gpt_dist_running") == 0)
        wait_until(lambda: gauge(metrics, "gpt_dist_cancelled_total") == 2)
        # So does leaving the page.
        ask(page, "a", 1024)
        wait_until(lambda: gauge(metrics, "gpt_dist_running") == 2)
        page.close()
        wait_until(lambda: gauge(metrics, "gpt_dist_running") == 0)
        wait_until(lambda: gauge(metrics, "gpt_dist_cancelled_total") == 4)


@pytest.mark.slow(30)
@pytest.mark.usefixtures("gradio")
def test_engine_in_process(model_dir: Path, browser: Any) -> None:
    port = free_port()
    with running("serve.playground", "--checkpoint", str(model_dir), "--port", str(port)):
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        ask(page, "abc", 10)
        page.get_by_text("10 tokens · length").first.wait_for(timeout=1000 * PATIENCE)
        page.get_by_role("tab", name="Model card").click()
        # the exported model's README
        page.locator("#card").get_by_text("GPT2LMHeadModel").first.wait_for(timeout=1000 * PATIENCE)
        page.locator("#card").get_by_text("As served").first.wait_for(timeout=1000 * PATIENCE)
        page.close()


def test_replies_show_whole_characters() -> None:
    """Tokens that form one character are shown as one piece, with their joint probability."""
    from gpt_dist.v1.generation_service_pb2 import GenerateStreamResponse

    tokenizer = load_tokenizer("gpt2")
    reply = playground.Reply()
    for token in tokenizer.encode("a🙃<"):
        message = GenerateStreamResponse(token_ids=[token])
        message.logprobs.add(token_id=token, token=tokenizer.token_bytes(token), logprob=-1.0)
        reply.add(message)
    reply.add(GenerateStreamResponse(text_delta="a🙃<"))
    assert [piece.text for piece in reply.pieces] == ["a", "🙃", "<"]
    parts = len(tokenizer.encode("🙃"))
    assert reply.pieces[1].probability == pytest.approx(2.718281828**-parts)
    assert "&lt;</i>" in reply.html("p")
    reply.text = "a"  # the server holds back the rest
    assert "🙃</i>" not in reply.html("p")


@pytest.mark.slow
@pytest.mark.usefixtures("gradio")
def test_bad_input(tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    with pytest.raises(GptDistError, match=f"no server answers at {nobody}"):
        playground.main(["--target", nobody])
    with pytest.raises(UsageError, match="no such run"):
        playground.main(["--checkpoint", str(tmp_path / "none")])
