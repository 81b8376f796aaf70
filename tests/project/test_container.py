"""compose.yaml and the image's commands, as far as they run without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.components import missing
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
REDUCED = (
    "--train.steps 4 --optim.warmup_steps 1 --train.eval_tokens 512 --train.checkpoint_every 2"
    " --train.eval_every 0 --train.sample_every 0 --device cpu"
)


def environment(**extra: str) -> dict[str, str]:
    """The environment of a container: the image's scripts and the commands are on its path."""
    scripts = [ROOT / "launch" / "container", ROOT / "launch", Path(sys.executable).parent]
    path = os.pathsep.join([*map(str, scripts), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def command(service: str, variables: dict[str, str]) -> list[str]:
    """A service's command behind the entrypoint, its ``${NAME:-default}`` filled in."""

    def fill(match: re.Match[str]) -> str:
        return variables.get(match[1], match[2])

    parts = COMPOSE["services"][service]["command"]
    return ["entrypoint.sh", *(re.sub(r"\$\{(\w+):-(.*?)\}", fill, part) for part in parts)]


@contextmanager
def background(*arguments: str, cwd: Path, **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(arguments, cwd=cwd, env=environment(**extra))
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def fetch(url: str, seconds: float = 300) -> str:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return str(reply.read().decode())
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.2)


@pytest.mark.slow
def test_compose_file_is_valid() -> None:
    for tool in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(tool[0]) and not subprocess.call([*tool, "version"], stdout=-3, stderr=-3):
            break
    else:
        missing("neither docker compose nor docker-compose is installed")
    done = subprocess.run(
        [*tool, "-f", "compose.yaml", "config"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert set(services) == {"train", "tensorboard", "serve", "prometheus", "grafana"}


def test_ports_are_for_this_machine_only() -> None:
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_mounted_files_exist() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), source


@pytest.mark.slow
def test_what_compose_starts(tmp_path: Path) -> None:
    """The run, its curves, the server that follows it, and a scrape where Prometheus looks."""
    (tmp_path / "data").mkdir()
    port, metrics, board = free_port(), free_port(), free_port()
    scrape = yaml.safe_load((ROOT / "launch/compose/prometheus.yml").read_text())
    target = scrape["scrape_configs"][0]["static_configs"][0]["targets"][0]
    serve = [part.replace("9090", str(metrics)) for part in command("serve", {})]
    assert f"serve:{metrics}" == target.replace("9090", str(metrics))
    settings = COMPOSE["services"]["serve"]["environment"] | {
        "GPT_DIST_SERVE_PORT": str(port),
        "GPT_DIST_SERVE_HOST": "127.0.0.1",
        "GPT_DIST_SERVE_THREADS": "1",
    }
    tensorboard = [part.replace("6006", str(board)) for part in command("tensorboard", {})]
    with background(*serve, cwd=tmp_path, **settings):  # waits for the run's first checkpoint
        train = command("train", {"TRAIN_FLAGS": REDUCED})
        subprocess.run(train, cwd=tmp_path, env=environment(), check=True, timeout=300)
        assert (tmp_path / "runs/run/checkpoints/step-00000004").is_dir()
        with background(*tensorboard, cwd=tmp_path):
            client = ["entrypoint.sh", "client", "generate", "ROMEO:", "--max-new-tokens", "4"]
            end = time.monotonic() + 300
            while True:
                reply = subprocess.run(
                    [*client, "--target", f"127.0.0.1:{port}"],
                    env=environment(),
                    cwd=tmp_path,
                    capture_output=True,
                )
                if reply.returncode == 0:
                    break
                assert time.monotonic() < end, reply.stderr
            assert "gpt_dist_running" in fetch(f"http://127.0.0.1:{metrics}/metrics")
            assert "train_loss" in fetch(f"http://127.0.0.1:{board}/data/plugin/scalars/tags")


@pytest.mark.slow
def test_entrypoint_knows_its_commands(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["entrypoint.sh", *arguments],
            env=environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    usage = run()
    assert usage.returncode == 0
    named = re.findall(r"\w+", usage.stdout.split("commands:")[1].split("Each has")[0])
    assert {"train", "serve", "client", "export"} <= set(named)
    for name in named:
        if name != "train":  # its --help is that of torchrun's worker
            assert "usage" in run(name, "--help").stdout.lower(), name
    assert run("echo", "hello").stdout == "hello\n"
