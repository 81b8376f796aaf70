"""train.init_from: the model takes the shape of the weights, and one's own export comes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gpt_dist import export, import_hf
from gpt_dist.checkpoints.reader import load_model
from gpt_dist.config.command_line import load
from gpt_dist.config.settings import Config
from gpt_dist.errors import UsageError
from gpt_dist.model.gpt import GPT
from gpt_dist.training.setup import setup
from gpt_dist.training.trainer import train_here
from tests.conftest import make_dataset, read_rows, words
from tests.training.conftest import ALONE, changed

SHAPES: list[dict[str, Any]] = [
    {},
    {"qkv_bias": False},
    {"bias": False},
    {"bias": False, "qkv_bias": True},
    {"norm": "post", "bias": False},
    {"tie_embeddings": False, "mlp_hidden": 48},
    {"architecture": "nanochat", "n_kv_head": 2},
    {"architecture": "nanochat", "tie_embeddings": True},
]


@pytest.fixture
def small(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    """Trains one step of a small model of some shape; returns its configuration."""

    def train(**model: Any) -> Config:
        shape = {"n_layer": 1, "n_head": 4, "n_embd": 16, "context_length": 16} | model
        quick = {"steps": 1, "eval_every": 0, "checkpoint_every": 0, "batch_tokens": 64}
        config = tiny_config(model=shape, train=quick, optim={"warmup_steps": 1})
        flags = ["--config", str(config), "--out_dir", str(tmp_path / "source")]
        train_here(load(flags)[0], ALONE, lambda: False)
        return load(flags)[0]

    return train


def fine_tuning(source: Config, out: Path, start: Path | None = None, *flags: str) -> Config:
    """The command of a fine-tuning run that names no shape; a preset would give another one."""
    argv = ["--config", "tinystories-small", "--device", "cpu", "--out_dir", str(out)]
    argv += ["--train.init_from", str(start or source.out_dir), "--train.compile", "false"]
    argv += ["--data.path", next(iter(source.data.path)), "--train.precision", "fp32"]
    argv += ["--data.tokenizer", source.data.tokenizer, "--train.batch_tokens", "64"]
    argv += ["--train.steps", "1", "--optim.warmup_steps", "1", "--train.sample_every", "0"]
    return load([*argv, *flags])[0]


def weights(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def start_weights(config: Config) -> tuple[Config, dict[str, torch.Tensor]]:
    """The resolved configuration of a run, and the weights it starts from."""
    run = setup(config, ALONE)
    try:
        return run.config, {name: p.clone() for name, p in weights(run.engine.model).items()}
    finally:
        run.close()


@pytest.mark.slow(2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", ["run", "export", "import"])
def test_the_shape_of_the_source(
    small: Callable[..., Config], tmp_path: Path, shape: dict[str, Any], way: str
) -> None:
    """From a run, from its export, and from the import of the export: the same model comes back."""
    source = small(**shape)
    start = Path(source.out_dir)
    if way != "run":
        export.main(["--checkpoint", str(start), "--out", str(tmp_path / "export")])
        start = tmp_path / "export"
    if way == "import":
        import_hf.main([str(start), "--out", str(tmp_path / "imported")])
        start = tmp_path / "imported"
    original, _, _ = load_model(source.out_dir)
    config, found = start_weights(fine_tuning(source, tmp_path / "tuned", start))
    assert config.model.shape == original.config.shape
    assert found.keys() == weights(original).keys()
    for name, tensor in weights(original).items():
        assert torch.equal(found[name], tensor), name
    assert config.model.dropout == 0.1  # the preset's: not a part of the shape


@pytest.mark.slow(2)
def test_a_run_keeps_the_shape_it_took(small: Callable[..., Config], tmp_path: Path) -> None:
    """config.yaml names it all; the run continues by the same command without its source."""
    source = small(qkv_bias=False)
    out = tmp_path / "tuned"
    train_here(fine_tuning(source, out), ALONE, lambda: False)
    saved = yaml.safe_load((out / "config.yaml").read_text())["model"]
    assert (saved["n_embd"], saved["n_layer"], saved["context_length"]) == (16, 1, 16)
    assert saved["qkv_bias"] is False
    assert saved["vocab_size"] == load_model(out)[0].vocab_size
    by_file, _ = load(["--config", str(out / "config.yaml")])
    assert by_file.model.shape == load_model(out)[0].config.shape
    shutil.rmtree(source.out_dir)
    longer = fine_tuning(source, out, None, "--train.steps", "2")
    train_here(longer, ALONE, lambda: False)
    assert read_rows(out)[-1]["step"] == 2
    train_here(changed(by_file, train=longer.train), ALONE, lambda: False)  # complete already


@pytest.mark.slow(5)
def test_a_conflict_names_the_flags(small: Callable[..., Config], tmp_path: Path) -> None:
    source = small(bias=False)
    config = fine_tuning(source, tmp_path / "tuned", None, "--model.n_layer", "3",
                         "--model.context_length", "32", "--model.bias", "true")  # fmt: skip
    with pytest.raises(UsageError) as refused:
        setup(config, ALONE)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    where = f"train.init_from = {source.out_dir}"
    assert lines[0] == f"model.n_layer = 3: {where} has 1; leave model.n_layer out"
    assert lines[1] == f"model.context_length = 32: {where} has 16; leave model.context_length out"
    assert lines[2] == f"model.bias = true: {where} has false; leave model.bias out"
    same = fine_tuning(source, tmp_path / "tuned", None, "--model.n_layer", "1",
                       "--model.mlp_hidden", "64", "--model.qkv_bias", "null")  # fmt: skip
    assert start_weights(same)[0].model.n_layer == 1


def test_the_batch_is_checked_against_the_shape_taken(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    """The preset's context of 128 would not divide it."""
    source = small()
    assert start_weights(fine_tuning(source, tmp_path / "tuned"))[0].batch_sequences == 4
    bad = fine_tuning(source, tmp_path / "tuned", None, "--train.batch_tokens", "72")
    with pytest.raises(UsageError, match=r"multiple of model\.context_length \* ranks = 16"):
        setup(bad, ALONE)


def without_mark(directory: Path) -> None:
    """An export as releases before this one wrote it: nothing says that the zeros are no bias."""
    path = directory / "config.json"
    data = json.loads(path.read_text())
    del data["gpt_dist"]
    path.write_text(json.dumps(data))


@pytest.mark.slow(2)
def test_an_older_export_and_a_flag(small: Callable[..., Config], tmp_path: Path) -> None:
    source = small(qkv_bias=False)
    out = tmp_path / "export"
    export.main(["--checkpoint", source.out_dir, "--out", str(out)])
    without_mark(out)
    config, found = start_weights(fine_tuning(source, tmp_path / "tuned", out))
    assert config.model.shape["qkv_bias"] is True
    assert "h.0.attn.c_attn.bias" in found
    asked = fine_tuning(source, tmp_path / "tuned", out, "--model.qkv_bias", "false")
    config, found = start_weights(asked)
    assert config.model.shape["qkv_bias"] is False
    assert "h.0.attn.c_attn.bias" not in found
    tensors = load_file(out / "model.safetensors")
    tensors["transformer.h.0.attn.c_attn.bias"][3] = 0.5
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(UsageError, match=r"model.qkv_bias = false: .*c_attn.bias.*leave"):
        setup(asked, ALONE)


@pytest.mark.slow(2)
def test_a_bias_that_was_trained_elsewhere_stays(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    """transformers trains the zeros too, and keeps what config.json says about them."""
    transformers = pytest.importorskip("transformers")
    source = small(bias=False)
    export.main(["--checkpoint", source.out_dir, "--out", str(tmp_path / "export")])
    assert load_model(tmp_path / "export")[0].config.bias is False
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        theirs.transformer.h[0].attn.c_attn.bias[0] = 0.25
    theirs.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "export" / name, tmp_path / "again" / name)
    model, _, _ = load_model(tmp_path / "again")
    assert model.config.shape["qkv_bias"] is True
    assert model.h[0].attn.c_attn.bias[0] == 0.25  # type: ignore[index,union-attr]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-5)


def test_another_tokenizer_is_named_before_the_shape(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    source = small()
    other = make_dataset(tmp_path / "other", words(500) + "ÄÖÜß" * 9, words(90))
    flags = ["--data.path", str(other), "--data.tokenizer", str(other)]
    with pytest.raises(UsageError, match=r"its tokenizer \(char, .* is not the data's \(char"):
        setup(fine_tuning(source, tmp_path / "tuned", None, *flags), ALONE)
