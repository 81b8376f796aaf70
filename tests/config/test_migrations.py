"""Settings under the names and values of an earlier release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt_dist.checkpoints.checkpoint import read_state
from gpt_dist.config import migrations
from gpt_dist.config.command_line import load
from gpt_dist.config.migrations import Migration, migrate
from gpt_dist.config.settings import Config
from gpt_dist.errors import UsageError

HISTORY = [
    Migration("train.max_iters", "train.iterations"),
    Migration("train.iterations", "train.steps"),
    Migration("optim.decay_lr", "optim.schedule", lambda on: "cosine" if on else "constant"),
    Migration(
        "train.precision", "train.precision", lambda name: {"bfloat16": "bf16"}.get(name, name)
    ),
    Migration("vocabulary", "data.tokenizer", lambda name: {"openai": "gpt2"}.get(name, name)),
    Migration("backend.name", None),
]
OLD = {
    "vocabulary": "openai",
    "backend": {"name": "gloo"},
    "train": {"max_iters": 900, "precision": "bfloat16"},
    "optim": {"decay_lr": False},
}
NEW = {
    "train": {"steps": 900, "precision": "bf16"},
    "optim": {"schedule": "constant"},
    "data": {"tokenizer": "gpt2"},
}


@pytest.fixture(autouse=True)
def history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "MIGRATIONS", HISTORY)


def test_each_entry_sees_what_those_before_it_made() -> None:
    before = json.loads(json.dumps(OLD))
    settings, changes = migrate(OLD)
    assert settings == NEW
    assert before == OLD  # not changed in place
    assert changes == [
        "train.max_iters is now train.iterations",
        "train.iterations is now train.steps",
        "optim.decay_lr is now optim.schedule",
        "train.precision = bfloat16 is now bf16",
        "vocabulary is now data.tokenizer",
        "backend.name no longer exists and is ignored",
    ]
    assert migrate(NEW) == (NEW, [])
    assert migrate({"train": "many"}) == ({"train": "many"}, [])


def test_a_yaml_file_with_old_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(json.dumps(OLD))
    config, _ = load(["--config", str(file)])
    assert (config.train.steps, config.train.precision) == (900, "bf16")
    assert (config.optim.schedule, config.data.tokenizer) == ("constant", "gpt2")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert f"note: --config {file}: train.iterations is now train.steps" in lines


def test_only_rank_0_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    file = tmp_path / "old.yaml"
    file.write_text(json.dumps(OLD))
    load(["--config", str(file)])
    assert capsys.readouterr().err == ""


def test_flags_with_old_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new.yaml"
    file.write_text(json.dumps(NEW))
    flags = ["--train.max_iters", "1000", "--vocabulary", "2024", "--backend.name", "gloo"]
    config, _ = load(["--config", str(file), *flags])
    assert config.train.steps == 1000  # wins over the file, which has the new name
    assert config.data.tokenizer == "2024"
    assert "note: command line: vocabulary is now data.tokenizer" in capsys.readouterr().err


def test_both_names(tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("train: {max_iters: 5, steps: 6}\n")
    with pytest.raises(UsageError) as refused:
        load(["--config", str(file), "--trian.steps", "5"])
    assert str(refused.value).splitlines()[0] == (
        f"--config {file}: train.iterations is now train.steps, and both are set"
    )


def test_a_value_that_cannot_be_converted_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("train: {precision: [bfloat16]}\n")
    with pytest.raises(UsageError, match=r"^train.precision = \['bfloat16'\]: .*auto \| bf16"):
        load(["--config", str(file)])


def test_a_checkpoint_with_old_names(tmp_path: Path) -> None:
    state = {"format_version": 1, "step": 7, "config": OLD | {"model": {}}, "files": {}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert Config.model_validate(read_state(tmp_path)["config"]).train.steps == 900
