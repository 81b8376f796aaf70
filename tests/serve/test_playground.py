"""The playground in a real browser, with a real server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.export import export_hf
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import CharTokenizer, load_tokenizer
from serve.playground.__main__ import check_page, launch_options, main, make_parser
from serve.playground.page import converse, model_info
from serve.playground.replies import GROWING, Reply, ended, panels
from tests import warm
from tests.components import require, require_module
from tests.conftest import free_port
from tests.serve.conftest import CONTEXT, PATIENCE, StartServer, wait_until
from tests.serve.test_security import Authority

LONG = 3000
ALPHABET = "abcdefghijklmnopqrstuvwxyz éß\n<>&\"'"
VOCABULARY = len(ALPHABET)
READY = re.compile(r"^ready:.*\n", re.MULTILINE)


@pytest.fixture
def gradio() -> None:
    """Imported by the tests that need it, because that takes seconds."""
    require_module("gradio", "Gradio is not installed: pip install 'gpt_dist[playground]'")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose replies are long enough to be stopped."""
    torch.manual_seed(10)
    tokenizer = CharTokenizer(ALPHABET)
    shape = {"n_layer": 24, "n_head": 4, "n_embd": 128, "context_length": LONG + 100}
    config = ModelConfig.model_validate(shape | {"vocab_size": tokenizer.vocab_size})
    directory = tmp_path_factory.mktemp("playground") / "model"
    export_hf(GPT(config), tokenizer, directory, torch.float32)
    return directory


@contextmanager
def running(module: str, *arguments: str) -> Iterator[str]:
    """Run a module until the block ends; yields its line ``ready: …``."""
    # Without the fast kernels a long reply takes seconds, which leaves time to stop it.
    slow = {"OMP_NUM_THREADS": "1", "GPT_DIST_KERNELS": "0", "GRADIO_ANALYTICS_ENABLED": "False"}
    with tempfile.TemporaryDirectory() as name:
        log = Path(name, "log")
        log.touch()
        process = warm.Command(module, arguments, (log, log), env=os.environ | slow)
        try:
            wait_until(lambda: process.poll() is not None or READY.search(log.read_text()))
            ready = READY.search(log.read_text())
            assert ready, log.read_text()
            yield ready[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[tuple[str, str]]:
    """Target and metrics address of a server."""
    options = [
        "--model-name",
        "mine",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--threads",
        "1",
        "--grace",
        "1",
    ]
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


@pytest.mark.slow(20)
@pytest.mark.usefixtures("gradio")
def test_streaming_and_stopping_in_a_browser(
    server: tuple[str, str], browser: Any, tmp_path: Path
) -> None:
    target, metrics = server
    port = free_port()
    with running("serve.playground", "--target", target, "--port", str(port)):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"http://127.0.0.1:{port}")
        # The page says what it talks to, and offers no more than the model can do.
        assert page.locator("#model h1").inner_text() == "mine"
        facts = page.locator("#model").inner_text()
        assert "weights model" in facts
        assert f"context of {LONG + 100:,} tokens" in facts
        assert page.title() == "mine · gpt_dist playground"
        for label, most in (("Tokens", LONG + 99), ("Samples", 8), ("Top k", VOCABULARY)):
            slider = page.get_by_label(f"range slider for {label}")
            assert slider.get_attribute("max") == str(most), label
        assert page.locator(".legend").count() == 0  # there is nothing to explain yet
        # A short reply.
        ask(page, "a <b> & é", 20)
        replies = page.locator(".reply")
        page.get_by_text("20 tokens · limit of 20 tokens").nth(1).wait_for(timeout=1000 * PATIENCE)
        assert replies.count() == 2
        texts = [reply.locator("pre").inner_text() for reply in replies.all()]
        assert all(text.startswith("a <b> & é") and len(text) == 29 for text in texts)
        title = replies.first.locator("i").first.get_attribute("data-hint")
        token = r"""['"].+['"]"""  # as Python writes it: an apostrophe in double quotes
        assert re.match(rf"{token}  \d+\.\d%\n\n( *\d+\.\d%  {token}\n?){{5}}", title), title
        assert page.locator(".legend i").count() == 10
        # What the server refuses leaves no panel of the replies before.
        ask(page, "a" * (LONG + 200), 20)
        page.locator("#status").get_by_text("INVALID_ARGUMENT").wait_for(timeout=1000 * PATIENCE)
        assert replies.count() == 0
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
        page.get_by_text("tokens · stopped").nth(1).wait_for(timeout=1000 * PATIENCE)
        assert page.get_by_text(f"tokens · {GROWING}").count() == 0
        # So does leaving the page.
        ask(page, "a", 1024)
        wait_until(lambda: gauge(metrics, "gpt_dist_running") == 2)
        page.close()
        wait_until(lambda: gauge(metrics, "gpt_dist_running") == 0)
        wait_until(lambda: gauge(metrics, "gpt_dist_cancelled_total") == 4)


@pytest.mark.slow(20)
@pytest.mark.usefixtures("gradio")
def test_engine_in_process(model_dir: Path, browser: Any) -> None:
    port = free_port()
    with running("serve.playground", "--checkpoint", str(model_dir), "--port", str(port)):
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        assert page.locator("#model h1").inner_text() == str(model_dir)
        ask(page, "abc", 10)
        page.get_by_text("10 tokens · limit of 10 tokens").first.wait_for(timeout=1000 * PATIENCE)
        page.get_by_role("tab", name="Model card").click()
        # the exported model's README
        page.locator("#card").get_by_text("GPT2LMHeadModel").first.wait_for(timeout=1000 * PATIENCE)
        page.locator("#card").get_by_text("As served").first.wait_for(timeout=1000 * PATIENCE)
        page.close()


CERTIFIED = ["--page-cert", "c.pem", "--page-key", "k.pem"]


@pytest.mark.parametrize(
    ("flags", "token", "missing"),
    [
        ([], "", "--page-cert"),
        (["--page-token-file", "t"], "", "--page-cert"),
        (CERTIFIED, "", "--page-token-file"),
        (["--allow-insecure"], "mine", "would lend its own token"),
        ([*CERTIFIED, "--allow-anonymous"], "mine", "would lend its own token"),
        (["--allow-insecure", "--tls-cert", "c", "--tls-key", "k"], "", "would lend its own token"),
    ],
)
def test_a_page_beyond_this_machine(
    flags: list[str], token: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_DIST_TOKEN", token) if token else monkeypatch.delenv(
        "GPT_DIST_TOKEN", raising=False
    )
    with pytest.raises(UsageError, match=missing):
        main(["--host", "0.0.0.0", *flags])


def test_pages_that_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_DIST_TOKEN", "mine")
    (tmp_path / "tokens").write_text("visitor\n")
    login = ["--page-token-file", str(tmp_path / "tokens")]
    for flags in ([], ["--host", "::1"], ["--host", "0.0.0.0", "--allow-insecure", *login]):
        check_page(make_parser().parse_args(flags))
    accepts = launch_options(make_parser().parse_args(login))["auth"]
    assert accepts("anybody", "visitor")
    assert not accepts("anybody", "mine")  # the page's own token is no visitor's


def test_the_page_reaches_a_tls_server(start: StartServer, model: GPT, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    cert, key = authority.issue("server")
    (tmp_path / "tokens").write_text("alpha\n")
    server = start(
        Decoder(model, max_slots=1, dtype="fp32"),
        tls_cert=cert, tls_key=key, auth_token_file=tmp_path / "tokens",
    )  # fmt: skip
    connection = {"target": server.target, "tls_ca": authority.path}
    with pytest.raises(GptDistError, match="UNAUTHENTICATED: the server requires a token"):
        model_info(connection)
    connection["token_file"] = tmp_path / "tokens"
    assert model_info(connection)[1] == 1

    async def last() -> tuple[str, str]:
        values = ("to be", 1, 5, 0.0, 0, 1.0, 0.0, 1.0, 3, "")
        shown = [update async for update in converse(connection, CONTEXT, *values)]
        return shown[-1]

    with ThreadPoolExecutor(1) as pool:  # the browser's driver may have a loop in this thread
        replies, status = pool.submit(asyncio.run, last()).result(PATIENCE)
    assert status == "seed 3"
    assert "to be" in replies


def test_replies_show_whole_characters() -> None:
    """Tokens that form one character are shown as one piece, with their joint probability."""
    from gpt_dist.v1.generation_service_pb2 import GenerateStreamResponse

    tokenizer = load_tokenizer("gpt2")
    reply = Reply(64)
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


def test_replies_that_grew_have_ended() -> None:
    done, growing = Reply(64), Reply(64)
    done.end = "length"
    shown = ended(panels([done, growing], f"p {GROWING}"), "<error>")
    assert f"<b>p {GROWING}</b>" in shown
    assert re.findall("· (.*?)</footer>", shown) == ["length", "&lt;error&gt;"]
    assert shown.count("legend") == 1
    assert panels([], "p") == ""


@pytest.mark.slow
@pytest.mark.usefixtures("gradio")
def test_bad_input(tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    with pytest.raises(GptDistError, match=f"no server answers at {nobody}"):
        main(["--target", nobody])
    with pytest.raises(UsageError, match="no such run"):
        main(["--checkpoint", str(tmp_path / "none")])
