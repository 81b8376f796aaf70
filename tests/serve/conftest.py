"""Tiny models, their decoders, and servers in threads."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_dist.checkpoints.writer import write_checkpoint
from gpt_dist.config.settings import ModelConfig
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import BpeTokenizer, Tokenizer
from serve.engine.loading import Loaded
from serve.engine.scheduler import Scheduler
from serve.options import Options
from serve.server import Server

CONTEXT = 160
TOKENIZER = BpeTokenizer.train(["Ünïcödé 👩‍🚀 text, to be, or not to be. " * 20], 300)
"""Most of its tokens are single bytes, and so random streams are full of half characters."""
VOCABULARY = TOKENIZER.vocab_size


def tiny_model(seed: int = 0, vocab_size: int = VOCABULARY, context: int = CONTEXT) -> GPT:
    """A random model whose logits are far enough apart to be told from each other."""
    torch.manual_seed(seed)
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, context_length=context, vocab_size=vocab_size
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.wte.weight[vocab_size:] = 0
    return model


@pytest.fixture(scope="session")
def model() -> GPT:
    return tiny_model()


@pytest.fixture
def make_decoder(model: GPT) -> Callable[..., Decoder]:
    def make(slots: int = 4, **options: object) -> Decoder:
        return Decoder(model, max_slots=slots, dtype="fp32", **options)  # type: ignore[arg-type]

    return make


def write_run(directory: Path, model: GPT, step: int = 100) -> Path:
    """A run directory with one checkpoint; returns the checkpoint."""
    path = directory / "checkpoints" / f"step-{step:08d}"
    hidden = path.with_name(f".writing-{path.name}")
    hidden.mkdir(parents=True)
    tensors = {
        f"model.{name}": (tensor[: model.vocab_size] if name == "wte.weight" else tensor).detach()
        for name, tensor in model.named_parameters()
    }
    state = {"step": step, "config": {"model": model.config.model_dump()}}
    write_checkpoint(hidden, tensors, state, TOKENIZER)
    hidden.rename(path)
    return path


class Process:
    """``python -m serve`` as users start it."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe could fill up
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )

    def ready(self) -> str:
        """Wait for the line that says where it listens; returns host:port."""
        assert self.process.stdout is not None
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("ready: "):
                return line.split()[1]
        raise AssertionError(self.end(None))

    def end(self, number: int | None = signal.SIGTERM, timeout: float = 120) -> tuple[int, str]:
        """Send a signal and wait; returns exit status and stderr."""
        if number is not None:
            self.process.send_signal(number)
        self.process.communicate(timeout=timeout)
        self.errors.seek(0)
        return self.process.returncode, self.errors.read()


@pytest.fixture
def processes() -> Iterator[Callable[..., Process]]:
    """Start servers as processes; what is left of them at the end is killed."""
    started: list[Process] = []

    def start(*arguments: object, **environment: str) -> Process:
        started.append(Process(*arguments, **environment))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.communicate()


class LiveServer:
    """A server in a thread with an event loop of its own."""

    def __init__(self, options: Options, loaded: Loaded | None) -> None:
        self.server: Server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.call(self._start(options, loaded))

    async def _start(self, options: Options, loaded: Loaded | None) -> None:
        self.server = Server(options)
        await self.server.start()
        if loaded is not None:
            self.server.use(loaded)

    def call(self, work: Coroutine[Any, Any, Any], timeout: float = 60) -> Any:
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def scheduler(self) -> Scheduler:
        assert self.server.engine is not None
        return self.server.engine.scheduler

    def at_rest(self, seconds: float = 5) -> bool:
        """Whether nothing is left in the engine and no call is open, soon."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            decoder = self.scheduler.decoder
            if (
                self.scheduler.load == 0
                and not self.server.service.open_calls
                and len(decoder.free_slots) == decoder.max_slots
                and not decoder.active_slots
            ):
                return True
            time.sleep(0.005)
        return False

    def close(self) -> None:
        self.call(self.server.drain())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def loaded(decoder: Decoder, tokenizer: Tokenizer = TOKENIZER, version: str = "v1") -> Loaded:
    """A decoder, as if it came from a checkpoint."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32}
    return Loaded(decoder, tokenizer, 1234, shape, Path("nowhere"), version, [])


StartServer = Callable[..., LiveServer]


@pytest.fixture(scope="module")
def start() -> Iterator[StartServer]:
    """Start servers: ``start(decoder, option=value, ...)``; they are closed at the end."""
    servers = []

    def starter(decoder: Decoder | None = None, **values: Any) -> LiveServer:
        options = Options(**{"checkpoint": Path("nowhere"), "port": 0, "grace": 5, **values})
        servers.append(LiveServer(options, None if decoder is None else loaded(decoder)))
        return servers[-1]

    yield starter
    for server in servers:
        if server._thread.is_alive():
            server.close()


class SlowDecoder:
    """A decoder whose steps and chunks take a while, and that can be held up."""

    def __init__(self, decoder: Decoder, seconds: float = 0.0) -> None:
        self.decoder, self.seconds = decoder, seconds
        self.go = threading.Event()
        self.go.set()
        self.steps = 0
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def _wait(self) -> None:
        self.go.wait()
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error

    def prefill(self, *arguments: Any) -> None:
        self._wait()
        self.decoder.prefill(*arguments)

    def step(self) -> Any:
        self._wait()
        self.steps += 1
        return self.decoder.step()


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was logged as an error, but for grpcio's own: with several event loops in a process its
    poller may find that another has read the wake-up byte before (BlockingIOError, harmless), and
    an answer may find that its call was cancelled a moment ago (once in 30,000).
    """
    own = ("PollerCompletionQueue", "ExecuteBatchError raised in core")
    return [
        record
        for record in caplog.records
        if record.levelname == "ERROR" and not any(name in record.getMessage() for name in own)
    ]
