"""What a run says at its start about settings: those that changed, those without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gpt_dist.config.command_line import load
from gpt_dist.config.settings import Config, to_yaml
from gpt_dist.errors import UsageError
from gpt_dist.training.setup import open_data
from gpt_dist.training.trainer import train_here
from tests.training.conftest import ALONE, changed

DATA = Path(__file__).parents[1] / "fixtures" / "release-0.1" / "data"
"""Its dataset.json names a tokenizer of characters."""


def test_a_resumed_run_says_what_changed(
    finished: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    train = finished.train.model_copy(update={"steps": 21, "batch_tokens": 512})
    train_here(changed(finished, train=train), ALONE, lambda: False)
    text = capsys.readouterr().out
    said, _, _ = text.partition("step 21")
    assert said.splitlines().count("changed: train.steps 20 → 21") == 1
    assert said.splitlines().count("changed: train.batch_tokens 1024 → 512") == 1
    assert text.count("changed: ") == 2
    train_here(
        changed(finished, train=train.model_copy(update={"steps": 22})), ALONE, lambda: False
    )
    assert "changed: train.steps 21 → 22" in capsys.readouterr().out


def test_a_tokenizer_that_the_data_does_not_have() -> None:
    """dataset.json wins, so a run with the named tokenizer would be another one."""
    preset = ["--config", "shakespeare-char-cpu", "--data.path", str(DATA)]
    named, _ = load([*preset, "--data.tokenizer", "gpt2"])
    with pytest.raises(UsageError, match=r"data\.tokenizer = gpt2: has no effect.*char, 60 tokens"):
        open_data(named)
    for flags in ([], ["--data.tokenizer", str(DATA)]):  # not named, or the data's own
        assert open_data(load([*preset, *flags])[0])


def test_a_resolved_file_names_no_tokenizer(tmp_path: Path) -> None:
    """config.yaml of a run says gpt2, the default, whatever the data has."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load(["--config", "shakespeare-char-cpu"])[0]))
    assert yaml.safe_load(file.read_text())["data"]["tokenizer"] == "gpt2"
    flags = ["--config", str(file), "--data.path", str(DATA)]
    assert open_data(load(flags)[0])
    with pytest.raises(UsageError, match="has no effect"):
        open_data(load([*flags, "--data.tokenizer", "gpt2"])[0])
