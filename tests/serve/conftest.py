"""Tiny models, their decoders, and servers in threads."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

from gpt_dist.checkpoints.writer import write_checkpoint
from gpt_dist.config.settings import ModelConfig
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import BpeTokenizer, Tokenizer
from serve.engine.engine import Engine
from serve.engine.loading import Loaded
from serve.engine.scheduler import Scheduler
from serve.options import Options
from serve.server import Server
from tests import warm
from tests.components import missing, require

CONTEXT = 160
TOKENIZER = BpeTokenizer.train(["Ünïcödé 👩‍🚀 text, to be, or not to be. " * 20], 300)
"""Most of its tokens are single bytes, so random streams are full of partial characters."""
VOCABULARY = TOKENIZER.vocab_size


def tiny_model(
    seed: int = 0,
    vocab_size: int = VOCABULARY,
    context: int = CONTEXT,
    architecture: Literal["gpt2", "nanochat"] = "gpt2",
) -> GPT:
    """A random model whose logits are far enough apart for a clear argmax."""
    torch.manual_seed(seed)
    config = ModelConfig(
        architecture=architecture,
        n_layer=2,
        n_head=2,
        n_embd=32,
        context_length=context,
        vocab_size=vocab_size,
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


PATIENCE = 120.0
"""Seconds until a wait gives up. Long: it ends a test that hangs, it measures nothing."""


def wait_until(condition: Callable[[], Any], what: str = "") -> None:
    """Poll until ``condition()`` is true; fail after `PATIENCE` seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"timed out waiting: {what or condition}"
        time.sleep(0.002)


class Clock:
    """A clock that a test sets by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Process:
    """A ``python -m serve`` process, which writes into a directory."""

    def __init__(self, directory: Path, *arguments: object, **environment: str) -> None:
        self.out, self.errors = directory / "stdout", directory / "stderr"
        for file in (self.out, self.errors):
            file.touch()
        self.command = warm.Command(
            "serve", [*map(str, arguments)], (self.out, self.errors),
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip

    def ready(self) -> str:
        """Wait for its line ``ready: …``; returns host:port."""
        ready = re.compile(r"^ready: (\S+).*\n", re.MULTILINE)
        wait_until(lambda: ready.search(self.out.read_text()) or self.command.poll() is not None)
        self.lines = self.out.read_text().splitlines()
        found = ready.search(self.out.read_text())
        assert found, self.log()
        return found[1]

    def log(self) -> str:
        """Return what it has written to stderr so far."""
        return self.errors.read_text()

    def end(self, number: int | None = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal and wait; returns exit status and stderr."""
        if number is not None:
            self.command.send_signal(number)
        return self.command.wait(PATIENCE), self.log()


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Start servers as processes; those still running at the end are killed."""
    started: list[Process] = []

    def start(*arguments: object, **environment: str) -> Process:
        directory = tmp_path_factory.mktemp("serve")
        started.append(Process(directory, *arguments, **environment))
        return started[-1]

    yield start
    for process in started:
        if process.command.poll() is None:
            process.end(signal.SIGKILL)


class LiveServer:
    """A server in a thread, with its own event loop."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self.server: Server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.call(self._start(options, clock))

    async def _start(self, options: Options, clock: Callable[[], float]) -> None:
        self.server = Server(options, clock)
        await self.server.start()

    def use(self, decoder: Decoder) -> None:
        """Serve a decoder as if it were loaded from a checkpoint."""

        async def use() -> None:
            self.server.use(loaded(decoder))

        self.call(use())

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the server's loop."""
        return self.begin(work).result(PATIENCE)

    def begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def scheduler(self) -> Scheduler:
        assert self.server.engine is not None
        return self.server.engine.scheduler

    @property
    def engine(self) -> Engine:
        assert self.server.engine is not None
        return self.server.engine

    @property
    def open_calls(self) -> int:
        """Calls that the service has accepted and not left."""
        return self.server.service.open_calls

    def wait_at_rest(self) -> None:
        """Wait until nothing is left in the engine and no call is open."""
        decoder = self.scheduler.decoder
        wait_until(
            lambda: (
                len(self.scheduler.jobs) == 0
                and not self.open_calls
                and len(decoder.free_slots) == decoder.max_slots
                and not decoder.active_slots
            ),
            "the server to come to rest",
        )

    def close(self) -> None:
        """Drain the server, unless a test has done so, and end its thread."""
        if not self.server.service.draining:
            self.call(self.server.drain())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def loaded(decoder: Decoder, tokenizer: Tokenizer = TOKENIZER, version: str = "v1") -> Loaded:
    """A decoder as if it were loaded from a checkpoint."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32}
    return Loaded(decoder, tokenizer, 1234, shape, Path("nowhere"), version, [])


StartServer = Callable[..., LiveServer]


@pytest.fixture(scope="module")
def start() -> Iterator[StartServer]:
    """Start servers: ``start(decoder, option=value, ...)``; they are closed at the end."""
    servers = []

    def starter(
        decoder: Decoder | None = None, clock: Callable[[], float] = time.monotonic, **values: Any
    ) -> LiveServer:
        options = Options(**{"checkpoint": Path("nowhere"), "port": 0, "grace": 5, **values})
        servers.append(LiveServer(options, clock))
        if decoder is not None:
            servers[-1].use(decoder)
        return servers[-1]

    yield starter
    for server in servers:
        if server.server.engine is not None:
            release = getattr(server.scheduler.decoder, "release", None)
            if release is not None:
                release()
        if server._thread.is_alive():
            server.close()


class HeldDecoder:
    """A decoder that computes only as much as a test allows; at first, everything.

    Each step, and each piece of prefill that has tokens, uses up one permit.

    Args:
        decoder: what computes.
        pause: seconds that each of them takes at the least.
    """

    made: ClassVar[weakref.WeakSet[HeldDecoder]] = weakref.WeakSet()
    """Those that may be held when a test ends."""

    def __init__(self, decoder: Decoder, pause: float = 0.0) -> None:
        self.decoder, self.pause = decoder, pause
        self.calls = 0
        """Steps and pieces of prefill that were let through."""
        self.error: Exception | None = None
        """Raised by the next of them."""
        self._permits, self._waiting = math.inf, False
        self._changed = threading.Condition()
        HeldDecoder.made.add(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    @property
    def held(self) -> bool:
        """Whether the engine waits for a permit: all that was allowed is done."""
        with self._changed:
            return self._waiting and self._permits <= 0

    def hold(self) -> None:
        """Let nothing through from now on."""
        self._set(0)

    def allow(self, count: int = 1) -> None:
        """Let some more through."""
        self._set(self._permits + count)

    def release(self) -> None:
        """Let everything through."""
        self._set(math.inf)

    def _set(self, permits: float) -> None:
        with self._changed:
            self._permits = permits
            self._changed.notify_all()

    def _wait(self) -> None:
        with self._changed:
            self._waiting = True
            self._changed.wait_for(lambda: self._permits > 0)
            self._waiting = False
            self._permits -= 1
            self.calls += 1
        time.sleep(self.pause)
        if self.error is not None:
            raise self.error

    def prefill(self, slot: int, ids: np.ndarray, start: int = 0) -> None:
        if len(ids):
            self._wait()
        self.decoder.prefill(slot, ids, start)

    def step(self) -> Any:
        self._wait()
        return self.decoder.step()


@pytest.fixture(autouse=True)
def _nothing_stays_held() -> Iterator[None]:
    """A test that fails while it holds a decoder must not stop the tests after it."""
    yield
    for decoder in HeldDecoder.made:
        decoder.release()


NODE = Path(__file__).parents[2] / "examples/node"


def node_package(name: str) -> Path:
    """The directory of an npm package that examples/node needs; installs them all if need be."""
    path = NODE / "node_modules" / name
    npm = require("npm")
    with (Path(tempfile.gettempdir()) / "gpt_dist-npm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be installing them
        if not path.exists():
            command = [npm, "install", "--no-audit", "--no-package-lock"]
            done = subprocess.run(command, cwd=NODE, capture_output=True, text=True)
            if done.returncode:
                missing(f"npm cannot install the packages of examples/node: {done.stderr[-200:]}")
    return path


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Records of level ERROR, without two harmless ones of grpcio's.

    With several event loops in one process its poller may find that another one has read the
    wake-up byte (BlockingIOError). A reply may find that its call was cancelled a moment ago (once
    in 30,000 calls).
    """
    own = ("PollerCompletionQueue", "ExecuteBatchError raised in core")
    return [
        record
        for record in caplog.records
        if record.levelname == "ERROR" and not any(name in record.getMessage() for name in own)
    ]
