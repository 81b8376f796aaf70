"""Every command of the recipes in docs/ runs, copied from the page and only reduced in size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests import warm
from tests.conftest import words

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
STEPS = (ROOT / "docs" / "bigram-to-transformer.md").read_text(encoding="utf-8")
RECIPES = {
    title: blocks
    for title, body in re.findall(
        r"^## (.+?)\n(.*?)(?=^## |\Z)", f"{PAGE}\n{STEPS}", re.MULTILINE | re.DOTALL
    )
    if (blocks := re.findall(r"^```(sh|python)\n(.*?)^```", body, re.MULTILINE | re.DOTALL))
}
"""Heading → (language, text) of each code block, for all sections that have any."""
SMALL = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.context_length": 16,
    "train.epochs": "null",
    "train.steps": 2,
    "train.batch_tokens": 64,
    "train.micro_batch_size": 2,
    "train.eval_tokens": 64,
    "train.eval_every": 1,
    "train.checkpoint_every": 1,
    "optim.warmup_steps": 1,
}


def reduced(line: str) -> list[str]:
    """Module and arguments with overrides appended; downloads get a local source."""
    start, *parts = shlex.split(line)
    if start == "torchrun":  # its part is tested elsewhere: here one rank trains without it
        launcher = get_args_parser().parse_args(parts)
        assert launcher.module, line
        parts = [launcher.training_script, *launcher.training_script_args]
    else:
        assert start == "python", line
        assert parts.pop(0) == "-m", line
    if "gpt_dist.train" in parts:
        small = dict(SMALL)
        if "bigram" in line:
            del small["model.n_layer"]
        if "--model.mlp_hidden" in parts or "--config gpt1" in line:
            small["model.mlp_hidden"] = 24
        return [*parts, *(f"--{key}={value}" for key, value in small.items()), "--device", "cpu"]
    for name, extra in {
        "gpt_dist.generate": ["--max-new-tokens", "8", "--device", "cpu"],
        "tinyshakespeare": ["--source", "story.txt"],
        "tinystories": ["--source", "offline/TinyStoriesV2-GPT4-train.txt"],
        "fineweb-edu": ["--source", "offline/fineweb-edu"],
        "hf": ["--source", "offline/hub"],
        "hellaswag": ["--source", "offline/hellaswag.jsonl", "--device", "cpu"],
        "bpe": ["--vocab-size", "300"],
    }.items():
        if name in parts:
            parts += extra
    return ["offline/gpt2" if part == "openai-community/gpt2" else part for part in parts]


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's files that the recipes name, and small stand-ins for downloads."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from gpt_dist.config.settings import ModelConfig
    from gpt_dist.export import export_hf
    from gpt_dist.model.gpt import GPT
    from gpt_dist.text.tokenizers import load_tokenizer

    directory = tmp_path_factory.mktemp("recipes")
    texts = ["The " + words(60, seed) for seed in range(80)]
    (directory / "wikipedia.txt").write_text("".join(texts), encoding="utf-8")
    (directory / "story.txt").write_text("".join(texts), encoding="utf-8")
    for folder in ("stories", "books"):
        (directory / folder).mkdir()
        for number in range(20):
            part = "".join(texts[4 * number : 4 * number + 4])
            (directory / folder / f"{number}.txt").write_text(part, encoding="utf-8")
    data = directory / "offline"
    for folder in ("fineweb-edu/sample/10BT", "hub"):
        (data / folder).mkdir(parents=True)
        table = pa.table({"text": texts})
        pq.write_table(table, data / folder / "train-00000.parquet")
    (data / "TinyStoriesV2-GPT4-train.txt").write_text("<|endoftext|>".join(texts))
    row = {"activity_label": "a", "ctx_a": "the cat", "ctx_b": "", "ctx": "the cat", "label": 0}
    row |= {"endings": ["sat", "ran", "sang", "hill"]}
    (data / "hellaswag.jsonl").write_text(json.dumps(row) + "\n")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 16, "vocab_size": 50257}
    model = GPT(ModelConfig.model_validate(shape))
    export_hf(model, load_tokenizer("gpt2"), data / "gpt2", torch.float32)
    return directory


def assert_runs(module: str, arguments: list[str], cwd: Path, line: str) -> None:
    status, output = warm.run(module, arguments, cwd, cwd / "log.txt")
    assert status == 0, f"{line}\n{arguments}\n{output}"


@pytest.mark.slow
@pytest.mark.parametrize("title", RECIPES)
def test_recipe(title: str, offline: Path, tmp_path: Path) -> None:
    for path in offline.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for kind, block in RECIPES[title]:
        if kind == "python":
            (tmp_path / "runpy_block.py").write_text(block, encoding="utf-8")
            assert_runs("runpy_block", [], tmp_path, block)
            continue
        for line in block.splitlines():
            module, *arguments = reduced(line)
            assert_runs(module, arguments, tmp_path, line)
    for run in (tmp_path / "runs").iterdir():
        assert (run / "loss.png").is_file()
        assert (run / "checkpoints" / "step-00000002").is_dir()
        assert (run / "samples.txt").is_file() or "finetuned" in run.name


def test_every_recipe_is_found() -> None:
    """The pattern above finds all recipes of the page and their commands."""
    assert len(RECIPES) == 7
    lines = [
        line for blocks in RECIPES.values() for _, block in blocks for line in block.split("\n")
    ]
    assert sum("gpt_dist.train" in line for line in lines) >= 16
