"""Shared by all tests: tiny data sets, and training in processes of its own."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, settings

from gpt_dist.data.shards import write_shard
from gpt_dist.text.tokenizers import CharTokenizer
from tests import forks, warm

os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # while the tests are imported, which takes a quarter less then
# Tests do not depend on the machine's speed.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
BIN = Path(sys.executable).parent

Row = dict[str, Any]
TIMING = ("tokens_per_second", "mfu", "step_ms")


def pytest_configure(config: pytest.Config) -> None:
    """Name the place where all workers find the process for forks."""
    if not hasattr(config, "workerinput"):
        directory = tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True)
        config.add_cleanup(directory.cleanup)
        os.environ |= {forks.SESSION: directory.name, forks.OWNER: str(os.getpid())}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every worker of xdist its share of the long tests, and let it begin with them.

    ``--dist worksteal`` hands out contiguous blocks of equal length, and a worker that is done
    takes from the end of another's. So what is left for the end is short. The other tests of a
    module stay together, and those of a folder nearly: a worker then imports transformers, or
    starts a module's server, only if one of its own tests needs it.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    long = sorted((i for i in items if _seconds(i) >= 30), key=_seconds, reverse=True)
    rest = [item for item in items if _seconds(item) < 30]
    queues = [long[worker::workers] for worker in range(workers)]
    length, more = divmod(len(items), workers)
    start = 0
    for worker, queue in enumerate(queues):
        end = start + length + (worker < more) - len(queue)
        queue.extend(_longest_modules_first(rest[start:end]))
        start = end
    items[:] = [item for queue in queues for item in queue]


def _longest_modules_first(items: list[pytest.Item]) -> list[pytest.Item]:
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    ordered = sorted(modules.values(), key=lambda tests: -sum(map(_seconds, tests)))
    return [item for tests in ordered for item in tests]


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through it again and again."""
    gc.freeze()
    gc.enable()


def _seconds(item: pytest.Item) -> float:
    """About how long a test takes: the argument of its mark ``slow``."""
    mark = item.get_closest_marker("slow")
    return (mark.args or (10,))[0] if mark else 0


def words(count: int, seed: int = 0) -> str:
    """Text with some structure to learn: words of a small vocabulary in random order."""
    vocabulary = "the cat dog sat on mat ran to tree and sun over red hill bird sang"
    generator = random.Random(seed)
    return " ".join(generator.choice(vocabulary.split()) for _ in range(count)) + "\n"


def make_dataset(directory: Path, text: str, val_text: str | None = None) -> Path:
    """Write a character-level data set with the functions of the shard format alone."""
    directory.mkdir(parents=True)
    tokenizer = CharTokenizer(sorted(set(text + (val_text or ""))))
    write_shard(directory / "x_train_000000.bin", np.array(tokenizer.encode(text), np.uint16))
    if val_text:
        write_shard(directory / "x_val_000000.bin", np.array(tokenizer.encode(val_text), np.uint16))
    tokenizer.save(directory)
    return directory


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws does not depend on the tests before it."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40,000 characters for training and 5,000 for validation."""
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", words(10_000), words(1_300, 1))


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a YAML configuration of a tiny model; keyword arguments update its sections."""

    def write(**sections: Any) -> Path:
        data: dict[str, Any] = {
            "seed": 1,
            "device": "cpu",
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32},
            "data": {"path": str(tiny_data), "tokenizer": str(tiny_data)},
            "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 20},
            "train": {
                "steps": 20,
                "batch_tokens": 1024,
                "micro_batch_size": 8,
                "precision": "fp32",
                "compile": False,
                "eval_every": 10,
                "eval_tokens": 2000,
                "checkpoint_every": 10,
                "sample_every": 0,
            },
        }
        for name, value in sections.items():
            if isinstance(value, dict):
                data[name] = data.get(name, {}) | value
            else:
                data[name] = value
        path = tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def break_compiler(directory: Path) -> Path:
    """Write a ``g++`` into a directory that prints two lines and fails."""
    compiler = directory / "g++"
    compiler.write_text("#!/bin/sh\necho out of order >&2; echo more >&2; exit 1\n")
    compiler.chmod(0o755)
    return compiler


def _arguments(config: Path, out: Path, *flags: str) -> list[str]:
    """The arguments of ``gpt_dist.train``."""
    return ["--config", str(config), "--out_dir", str(out), *flags]


def train_command(config: Path, out: Path, *flags: str, ranks: int = 1) -> list[str]:
    """The command line of a training run; more than one rank through torchrun."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start = [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={ranks}", "-m"]
    return [*start, "gpt_dist.train", *_arguments(config, out, *flags)]


def start_train(config: Path, out: Path, *flags: str, ranks: int = 1) -> warm.Ranks:
    """Start a training run in forks, its output in files beside its directory."""
    outputs = out.with_suffix(".out"), out.with_suffix(".err")
    return warm.Ranks("gpt_dist.train", _arguments(config, out, *flags), ranks, outputs)


def run_train(
    config: Path,
    out: Path,
    *flags: str,
    ranks: int = 1,
    check: bool = True,
    fresh: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Train in processes of their own.

    Args:
        config: a configuration file.
        out: the run's directory.
        flags: more flags of ``gpt_dist.train``.
        ranks: how many processes.
        check: fail the test where the run fails.
        fresh: start the command line that people type, torchrun included, instead of warm forks.
        options: ``cwd`` and ``env``; with ``fresh`` all of ``subprocess.run``'s.
    """
    if fresh:
        command = train_command(config, out, *flags, ranks=ranks)
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, **options)
    else:
        done = warm.run_ranks("gpt_dist.train", _arguments(config, out, *flags), ranks, **options)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def step_count(out: Path) -> int:
    """Training rows that a run has written so far."""
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b'"train_loss"') if metrics.exists() else 0


def fork() -> int:
    """As ``os.fork``, for a process that may have used gRPC.

    When they are collected, gRPC's objects wait for their threads. A fork has none of these and
    would wait forever, so it leaves alone what was there before.
    """
    child = os.fork()
    if not child:
        gc.freeze()
    return child


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports on which nobody listens at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def free_port() -> int:
    """A TCP port on which nobody listens at the moment."""
    return free_ports(1)[0]


def wait_until(
    condition: Callable[[], object],
    what: str,
    seconds: float = 300,
    agent: subprocess.Popen[Any] | warm.Ranks | None = None,
) -> None:
    """Wait for a condition.

    Args:
        condition: asked again and again.
        what: what it stands for, for the message.
        seconds: after which the test fails; far more than a slow machine needs.
        agent: a process without which the condition cannot come true; its end fails the test.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert agent is None or agent.poll() is None, f"a process ended before {what}"
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def read_rows(out: Path, *, timing: bool = True) -> list[Row]:
    """The rows of a run's metrics.jsonl; every line must be complete."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if timing:
        return rows
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def column(out: Path, name: str) -> list[float]:
    """The values of one key, from the rows that have it."""
    return [row[name] for row in read_rows(out) if name in row]


def train_many(runs: list[list[str]], directory: Path, ranks: int = 1) -> None:
    """Run several trainings one after the other in one set of ranks; see ``train_many.py``."""
    file = directory / f"runs-{len(list(directory.glob('runs-*.json')))}.json"
    file.write_text(json.dumps(runs))
    done = warm.run_ranks("tests.train_many", [str(file)], ranks, timeout=540)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
