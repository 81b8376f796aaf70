"""What release 0.1 wrote still loads, continues and serves (tests/fixtures/release-0.1)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt_dist.checkpoints.checkpoint import newest_checkpoint, read_state
from gpt_dist.checkpoints.reader import load_model
from gpt_dist.config.command_line import load
from gpt_dist.data.dataset import open_dataset
from gpt_dist.files import file_sha256
from gpt_dist.generate import main as generate
from gpt_dist.ops import native_training
from gpt_dist.training.trainer import train
from serve.engine import loading
from serve.options import Options
from tests.conftest import read_rows

FIXTURE = Path(__file__).parents[1] / "fixtures" / "release-0.1"
FINGERPRINT = "009df68af9281c245747b0faf08150545aabdc224f4f575f00d62d63ed8e0109"
RUNS = {"adamw": 1e-6, "muon": 1e-4}
"""Run → how far losses may differ between CPUs, relative.

Between AVX2 and PyTorch's plain kernels 3e-8 was measured for AdamW. Muon rounds to bf16 between
its products: 1.1e-5 was measured between bf16 products and fp32 products rounded to bf16.
"""


@pytest.fixture(autouse=True)
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on a copy; the configurations in it name the data set by a relative path."""
    shutil.copytree(FIXTURE, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def losses(run: str) -> list[dict[str, Any]]:
    return read_rows(Path(run), timing=False)


@pytest.mark.slow(2)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_continues(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded run, the continued one and one that today's code makes from the start.

    All by PyTorch's own operations, with which release 0.1 computed in fp32. The first is compared
    within rounding, because another CPU wrote it. The other two must agree bitwise wherever
    today's code reaches the recorded weights at step 6 bit for bit; where it does not, the run
    from the start is only within rounding too.
    """
    monkeypatch.setattr(native_training, "kernels", lambda: None)
    recorded = losses(name)
    config = ["--config", f"{name}/config.yaml", "--train.keep_checkpoints", "9"]
    if name == "muon":  # as the release did
        config += ["--optim.split_qkv", "false"]
    train(load(config)[0])
    train(load([*config, "--out_dir", "whole"])[0])
    for run in (name, "whole"):
        rows = losses(run)
        assert [set(row) for row in rows] == [set(row) for row in recorded]
        for row, before in zip(rows, recorded, strict=True):
            assert row == pytest.approx(before, rel=RUNS[name]), run
    first, last = "checkpoints/step-00000006", "checkpoints/step-00000010"
    for file in ("model.safetensors", "optimizer.safetensors"):
        if file_sha256(Path("whole", first, file)) != file_sha256(FIXTURE / name / first / file):
            return
    assert losses(name) == losses("whole")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert Path(name, last, file).read_bytes() == Path("whole", last, file).read_bytes()


@pytest.mark.parametrize("name", RUNS)
def test_configuration_and_state(name: str) -> None:
    config, _ = load(["--config", f"{name}/config.yaml"])
    assert (config.optim.name, config.model.n_embd, config.train.steps) == (name, 16, 10)
    newest = newest_checkpoint(Path(name, "checkpoints"))
    assert newest is not None
    state = read_state(newest)
    assert (state["step"], state["sequences"], state["fingerprint"]) == (6, 96, FINGERPRINT)


def test_data_set() -> None:
    data = open_dataset(Path("data"), "gpt2")
    assert data.fingerprint == FINGERPRINT
    assert data.tokenizer.vocab_size == 60
    split = data.split("train")
    assert split is not None
    assert len(split) == 8100
    assert data.tokenizer.decode(split.read(0, 25).tolist()) == "A MIDSUMMER NIGHT'S DREAM"


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, state = load_model(name)
    # The validation loss that the old trainer logged, computed here from the data and the model.
    tokens = np.fromfile("data/text_val_000000.bin", np.uint16, offset=1024).astype(np.int64)
    windows = torch.from_numpy(tokens[: 16 * 32]), torch.from_numpy(tokens[1 : 16 * 32 + 1])
    ids, targets = (part.view(32, 16) for part in windows)
    with torch.no_grad():
        logits = model(ids)[..., : model.vocab_size]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    logged = next(r["val_loss"] for r in losses(name) if r["step"] == 6 and "val_loss" in r)
    assert loss.item() == pytest.approx(logged, rel=1e-6)
    assert state["best_loss"] == logged
    assert tokenizer.decode(tokenizer.encode("THE")) == "THE"

    ask = ["--checkpoint", name, "--prompt", "THE", "--dtype", "fp32", "--device", "cpu"]
    ask.append("--stop-at-context")  # as the release did
    generate([*ask, "--temperature", "0"])
    assert capsys.readouterr().out == Path(name, "greedy.txt").read_text()
    generate([*ask, "--temperature", "0.8", "--top-k", "20", "--seed", "5"])
    assert capsys.readouterr().out == Path(name, "sampled.txt").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_the_server_loads_it(name: str) -> None:
    options = Options(Path(name, "checkpoints/best"), dtype="fp32", max_slots=2)
    loaded = loading.load(options)
    assert loaded.shape == {"n_layer": 2, "n_head": 2, "n_embd": 16}
    state = json.loads(Path(name, "checkpoints/best/state.json").read_text())
    assert loaded.version == f"step-00000006-{state['files']['model.safetensors'][:8]}"
    weights, version = loading.load_next(loaded.decoder, loaded.tokenizer, loaded.directory)
    assert weights is not None
    assert version == loaded.version
