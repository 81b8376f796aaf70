"""Every mistake of the table is answered in one line, and leaves the disk as it was."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from gpt_dist import prepare
from gpt_dist.checkpoints.writer import write_checkpoint
from gpt_dist.config.settings import Config, ModelConfig
from gpt_dist.errors import run_main
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT, VOCAB_PARAMETERS
from gpt_dist.text.tokenizers import load_tokenizer
from serve.client import connection
from serve.options import Options
from tests import warm
from tests.conftest import words
from tests.serve.conftest import LiveServer, tiny_model
from tests.serve.test_security import Authority


def read_table() -> list[tuple[str, int, str]]:
    """The rows of ``mistakes.txt``: what was typed, exit status, regular expression."""
    text = Path(__file__).with_name("mistakes.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    answers = (line.split(maxsplit=1) for line in lines[1::2])
    return [
        (typed, int(status), sense)
        for typed, (status, sense) in zip(lines[::2], answers, strict=True)
    ]


MISTAKES = read_table()
TINY = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 32},
    "data": {"path": "data/mine"},
    "optim": {"warmup_steps": 1},
    "train": {"steps": 5, "batch_tokens": 256, "micro_batch_size": 4, "precision": "fp32"},
    "device": "cpu",
    "out_dir": "runs/new",
}


def make_workspace(place: Path) -> None:
    """Files that the commands of the table name: some whole, some not."""
    texts, configs = place / "texts", place / "configs"
    for directory in (texts, configs, place / "models" / "bert", place / "models" / "pickle"):
        directory.mkdir(parents=True)
    (texts / "good.txt").write_text(words(400))
    (texts / "empty.txt").write_text("\n")
    (texts / "latin1.txt").write_bytes("café\n".encode("latin-1") * 20)
    (texts / "utf16.txt").write_bytes("hello there".encode("utf-16"))
    (texts / "fake.txt.gz").write_bytes(b"not compressed")
    (texts / "bad.jsonl").write_text('{"text": "fine"}\n{"id": 2, "url": "x" "text": "y"}\n')
    (texts / "number.jsonl").write_text('{"text": 3}\n')
    (texts / "good.jsonl").write_text('{"id": 1, "text": "fine"}\n')
    table = pa.table({"id": [1], "content": ["fine"]})
    pq.write_table(table, texts / "other.parquet")
    (configs / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (configs / "bad.yaml").write_text("train:\n  steps: 5: 6\n")
    (configs / "list.yaml").write_text("- 5\n")
    (configs / "key.yaml").write_text("modle:\n  n_layer: 5\n")
    (configs / "latin1.yaml").write_bytes("out_dir: café\n".encode("latin-1"))
    (place / "models/bert/config.json").write_text('{"model_type": "bert"}')
    (place / "models/pickle/config.json").write_text('{"model_type": "gpt2"}')
    (place / "models/pickle/pytorch_model.bin").write_bytes(b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        command = "prepare text texts/good.txt --tokenizer char --val-fraction 0.1 --out data/mine"
        patch.setattr(sys, "argv", command.split())
        prepare.main()
    for name in ("broken", "foreign", "unfinished"):
        shutil.copytree(place / "data/mine", place / "data" / name)
    shard = place / "data/broken/text_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-7])
    shard = place / "data/foreign/text_train_000000.bin"
    shard.write_bytes(b"\0\0\0\0" + shard.read_bytes()[4:])
    (place / "data/unfinished/dataset.json").rename(place / "data/unfinished/prepare.journal")
    (place / "data/good").mkdir()
    (place / "data/good/notes").write_text("mine")
    make_checkpoint(place)
    damaged = place / "runs/damaged/checkpoints/step-00000005"
    shutil.copytree(place / "runs/mine", place / "runs/damaged")
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[:-9])


def make_checkpoint(place: Path) -> None:
    tokenizer = load_tokenizer(place / "data/mine")
    shape = ModelConfig.model_validate({**TINY["model"], "vocab_size": tokenizer.vocab_size})  # type: ignore[dict-item]
    model = GPT(shape)
    tensors = {
        f"model.{name}": tensor[: model.vocab_size] if name in VOCAB_PARAMETERS else tensor
        for name, tensor in model.state_dict().items()
    }
    directory = place / "runs/mine/checkpoints/step-00000005"
    directory.mkdir(parents=True)
    state = {"step": 5, "config": Config(model=shape).model_dump()}
    write_checkpoint(directory, tensors, state, tokenizer)


def snapshot(place: Path) -> dict[str, tuple[int, int]]:
    """Every path, with the size and time of change of files."""
    found = {}
    for path in place.rglob("*"):
        stat = path.lstat()
        found[str(path)] = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What the placeholders stand for, and the workspace under ``here``."""
    here = tmp_path_factory.mktemp("mistakes")
    make_workspace(here)
    safe = tmp_path_factory.mktemp("safe")
    ours = Authority(safe, "ours")
    cert, key = ours.issue("server")
    _, other_key = ours.issue("other")
    tokens = safe / "tokens"
    tokens.write_text("secret\n")
    decoder = Decoder(tiny_model(), max_slots=1, dtype="fp32")
    servers = {
        "plain": LiveServer(Options(Path("nowhere"), port=0)),
        "tls": LiveServer(Options(Path("nowhere"), port=0, tls_cert=cert, tls_key=key)),
        "locked": LiveServer(Options(Path("nowhere"), port=0, auth_token_file=tokens)),
        "draining": LiveServer(Options(Path("nowhere"), port=0)),
    }
    for server in servers.values():
        server.use(decoder)
    servers["draining"].server.service.draining = True
    with socket.socket() as busy, socket.socket() as nobody:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        nobody.bind(("127.0.0.1", 0))  # without listen, connections are refused
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        yield {
            "here": here, "tiny": "configs/tiny.yaml", "cert": cert, "key": key,
            "other_key": other_key, "ca": ours.path, "busy": busy.getsockname()[1],
            "nobody": address, "nobody_url": f"http://{address}/input.txt",
            **{name: server.target for name, server in servers.items()},
        }  # fmt: skip
    servers["draining"].server.service.draining = False
    for server in servers.values():
        server.close()


def type_here(command: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run ``MODULE ARGUMENTS`` in this process as ``python -m`` would; status and stderr."""
    name, *arguments = shlex.split(command)
    spec = importlib.import_module(name)
    module = importlib.import_module(f"{name}.__main__") if hasattr(spec, "__path__") else spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        # The client would try again, as a server may restart.
        patch.setattr(connection, "CHANNEL_OPTIONS", [("grpc.enable_retries", 0)])
        patch.setattr("serve.logs.set_up", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            run_main(module.main)
    status = ended.value.code
    assert isinstance(status, int)
    return status, capfd.readouterr().err


def type_fresh(command: str) -> tuple[int, str]:
    """The same in a process of its own, which cannot reach the hub."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    module, *arguments = shlex.split(command)
    if module.partition(".")[0] == "serve":  # never asks the hub
        done = warm.run_ranks(module, arguments, env=environment)
    else:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True, text=True, env=environment, timeout=240,
        )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("typed", "status", "sense"),
    [
        pytest.param(*row, id=row[0], marks=[pytest.mark.slow] * row[0].startswith("fresh: "))
        for row in MISTAKES
    ],
)
def test_a_mistake_is_answered_in_one_line(
    typed: str,
    status: int,
    sense: str,
    places: dict[str, object],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Path(str(places["here"]))
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HOME", str(here / "huggingface"))
    before = snapshot(here)
    command = typed.format(**places)
    if typed.startswith("fresh: "):
        found, errors = type_fresh(command.removeprefix("fresh: "))
    else:
        found, errors = type_here(command, capfd)
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    assert re.search(sense, lines[0]), lines[0]
    assert found == status, lines[0]
    assert snapshot(here) == before


def test_the_table_is_long_and_covers_every_command() -> None:
    assert len(MISTAKES) >= 60
    names = {row[0].removeprefix("fresh: ").split()[0] for row in MISTAKES}
    from gpt_dist.__main__ import COMMANDS

    assert names == set(COMMANDS) - {"gpt_dist.kernels"} | {"gpt_dist"}


def test_python_m_gpt_dist_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """All modules that end in ``run_main(main)``, and no others."""
    from gpt_dist.__main__ import COMMANDS, main

    root = Path(prepare.__file__).parents[1]
    found = set()
    for folder in ("gpt_dist", "serve"):
        for path in (root / folder).rglob("*.py"):
            if "run_main(main" in path.read_text() and path.name != "errors.py":
                name = ".".join(path.relative_to(root).with_suffix("").parts)
                found.add(name.removesuffix(".__main__"))
    assert set(COMMANDS) == found - {"gpt_dist"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpt_dist"])
        main()
    listed = capsys.readouterr().out
    assert all(f"python -m {name} " in listed for name in COMMANDS)
    assert json.dumps(listed).count("python -m") == len(COMMANDS)
