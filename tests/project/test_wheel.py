"""The wheel is installed in an empty environment and used from an empty directory.

To save minutes, its dependencies are those of this environment, added to the new one's path. With
``SOAK=1`` pip installs them all, from the wheel's own metadata.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["pyproject.toml", "README.md", "LICENSE", "configs", "gpt_dist", "serve"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as for a release."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for part in PARTS:
        path = ROOT / part
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, source / part)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(directory.glob("*.whl"))


@pytest.mark.slow
def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "gpt_dist", "serve"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = {name for name in tracked.stdout.split() if (ROOT / name).is_file()}
    wanted |= {f"gpt_dist/config/presets/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert wanted <= names
    assert not any(name.startswith(("tests", "proto", "launch", "configs")) for name in names)


@pytest.mark.slow(25)
def test_use(wheel: Path, tmp_path: Path) -> None:
    home, work = tmp_path / "environment", tmp_path / "empty"
    work.mkdir()
    full = "SOAK" in os.environ
    venv.create(home, with_pip=full, symlinks=True)
    python = home / "bin" / "python"
    if full:
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    else:
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # Another home, but the kernels that the cache holds: tests/ops/test_build.py compiles them.
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "XDG_CACHE_HOME": cache}

    def run(module: str, *arguments: str) -> str:
        done = subprocess.run(
            [python, "-m", module, *arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import gpt_dist; print(gpt_dist.__file__)"],
        cwd=work, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(home))
    run("gpt_dist.prepare", "shakespeare", "--tokenizer", "char")
    options = ["--train.steps=5", "--optim.warmup_steps=5", "--train.eval_tokens=2048"]
    assert "--train.steps" in run("gpt_dist.train", "--help")
    run("gpt_dist.train", "--config", "shakespeare-char-cpu", *options)
    run("gpt_dist.export", "--checkpoint", "runs/shakespeare-char-cpu", "--out", "exported")
    server = subprocess.Popen(
        [python, "-m", "serve", "--checkpoint", "exported", "--port", "0"],
        cwd=work, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        ready = next(line for line in server.stdout if line.startswith("ready:"))
        target = re.findall(r"[\d.]+:\d+", ready)[0]
        reply = run("serve.client", "generate", "ROMEO:", "--target", target)
        assert len(reply) > 20
    finally:
        server.terminate()
        assert server.wait(30) == 0


def test_a_rented_machine_gets_what_it_lacks() -> None:
    """A dependency is there already, travels as a wheel, or is of no use to the GPU suite."""
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = {re.split(r"[<>=]", name)[0].lower().replace("-", "_") for name in names}
    script = (ROOT / "benchmarks/gpu_wheels.sh").read_text()
    carried = set(script.lower().replace("-", "_").split())
    there = {"torch", "tensorboard", "rich", "tiktoken", "requests"}
    there |= {"numpy", "tokenizers", "safetensors", "huggingface_hub", "httpx", "pyyaml"}
    assert needed - carried - there == {"pyarrow", "datasets"}
