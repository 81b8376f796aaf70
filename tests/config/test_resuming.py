"""What a continued run may change: the rules, the lines it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpt_dist.config.command_line import load
from gpt_dist.config.migrations import put
from gpt_dist.config.resuming import FREE, MAY_CHANGE, changes, fixed
from gpt_dist.config.settings import Config, flags
from gpt_dist.errors import UsageError
from gpt_dist.training.starting_point import check_same_run

SOURCE = Path("runs/old/checkpoints/step-00000010")


def with_settings(**settings: Any) -> Config:
    """The default configuration with some settings; ``__`` stands for a dot."""
    data = Config(model={"vocab_size": 65}).model_dump()
    for name, value in settings.items():
        put(data, name.replace("__", "."), value)
    return Config.model_validate(data)


def check(config: Config, fingerprint: str = "f") -> list[str]:
    state = {"config": with_settings().model_dump(), "fingerprint": "f"}
    return changes(check_same_run(config, state, fingerprint, SOURCE), config)


def test_every_setting_has_one_rule() -> None:
    named = [setting for rule in MAY_CHANGE for setting in rule.settings]
    assert len(named) == len(set(named))
    assert set(named) == set(FREE)
    assert set(named) | set(fixed()) == set(flags())
    assert {"seed", "optim.lr", "model.n_embd", "data.shuffle"} <= set(fixed())


def test_a_run_of_muon_from_before_it_split_matrices() -> None:
    """It says that its update changes, and keeps it if it is told to."""
    saved = with_settings(optim__name="muon").model_dump()
    del saved["optim"]["split_qkv"]
    state = {"config": saved, "fingerprint": "f"}
    for split, lines in ((True, ["changed: optim.split_qkv false → true"]), (False, [])):
        config = with_settings(optim__name="muon", optim__split_qkv=split)
        assert changes(check_same_run(config, state, "f", SOURCE), config) == lines


def test_what_changed_is_named() -> None:
    config = with_settings(
        train__batch_tokens=16384,
        train__epochs=2.0,
        train__compile=False,
        data__path={"a": 0.5, "b": 1.0},
        train__init_from="x",
        out_dir="elsewhere",
        resume="never",
    )
    assert check(config) == [
        "changed: data.path data/fineweb-edu-sample-10BT → a:0.5,b",
        "changed: train.epochs null → 2",
        "changed: train.batch_tokens 524288 → 16384",
        "changed: train.compile auto → false",
        "changed: train.init_from null → x (no effect: the run continues)",
    ]
    assert check(with_settings()) == []


@pytest.mark.parametrize(
    ("settings", "line", "way_out"),
    [
        ({"seed": 5}, "seed = 5: the run in {} has 1337", True),
        ({"optim__lr": 1e-3}, "optim.lr = 0.001: the run in {} has 0.0006", True),
        ({"model__dropout": 0.5}, "model.dropout = 0.5: the run in {} has 0", True),
        ({"model__n_embd": 96}, "model.n_embd = 96: the run in {} has 768", False),
        ({"model__bias": False}, "model.bias = false: the run in {} has true", False),
    ],
)
def test_a_refusal_names_the_way_out(settings: Any, line: str, way_out: bool) -> None:
    """Weights can start a new run if they have the shape of its model."""
    with pytest.raises(UsageError) as refused:
        check(with_settings(**settings))
    text = str(refused.value)
    assert text.startswith(f"{line.format(SOURCE)}; choose another --out_dir for a new run")
    assert (f"--train.init_from {SOURCE} starts it from these weights" in text) == way_out
    assert "\n" not in text


def test_other_data_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not the data of the run in .*--train.init_from"):
        check(with_settings(), "other")


def test_the_way_out_is_one(tmp_path: Path) -> None:
    """The flag that the refusal names is a flag."""
    assert load(["--train.init_from", str(SOURCE)])[0].train.init_from == str(SOURCE)
