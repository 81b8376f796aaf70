"""The end of a run: longer ones continue from before the decay; the average of the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt_dist.checkpoints.reader import load_model
from gpt_dist.config.command_line import load
from gpt_dist.errors import UsageError
from gpt_dist.evaluate import main as evaluate
from gpt_dist.export import main as export
from gpt_dist.training.trainer import train_here
from tests.conftest import read_rows
from tests.training.conftest import ALONE

SMALL = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8}


def run(config: Path, out: Path, *flags: str) -> list[dict[str, object]]:
    """Train here; the rows of training."""
    train_here(load(["--config", str(config), "--out_dir", str(out), *flags])[0], ALONE, bool)
    return [row for row in read_rows(out, timing=False) if "train_loss" in row]


@pytest.mark.slow(5)
def test_a_finished_run_of_wsd_is_extended(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint before its decay, bitwise as if it had been longer from the start."""
    config = tiny_config(
        model=SMALL,
        optim={"schedule": "wsd", "warmup_steps": 2, "decay_share": 0.4},
        train={"steps": 10, "batch_tokens": 64, "checkpoint_every": 3, "keep_checkpoints": 1,
               "eval_every": 0},
    )  # fmt: skip
    run(config, tmp_path / "short")
    names = {path.name for path in (tmp_path / "short/checkpoints").glob("step-*")}
    assert names == {"step-00000006", "step-00000010"}
    whole = run(config, tmp_path / "whole", "--train.steps", "20")
    before = tmp_path / "short/checkpoints/step-00000006"
    longer = run(config, tmp_path / "longer", "--resume", str(before), "--train.steps", "20")
    assert longer == whole[6:]
    assert whole[7]["lr"] == whole[2]["lr"] != whole[13]["lr"]
    capsys.readouterr()
    run(config, tmp_path / "short", "--train.steps", "12")  # where it is: told what is better
    said = capsys.readouterr().out
    assert f"fell since step 6; better continue --resume {before} " in said


@pytest.mark.slow(5)
def test_the_average_is_saved_continued_evaluated_and_exported(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        model=SMALL,
        optim={"average": 0.5, "average_share": 0.5, "lr": 0.03, "warmup_steps": 2},
        train={"steps": 8, "batch_tokens": 64, "checkpoint_every": 1, "keep_checkpoints": 9,
               "eval_every": 0},
    )  # fmt: skip
    out, again = tmp_path / "run", tmp_path / "again"
    run(config, out)
    checkpoints = [out / f"checkpoints/step-{step:08d}" for step in range(1, 9)]
    weights = [dict(load_model(path)[0].named_parameters()) for path in checkpoints]
    found = dict(load_model(checkpoints[-1], average=True)[0].named_parameters())
    for name, tensor in found.items():
        expected = weights[4][name]
        for later in weights[5:]:
            expected = expected.lerp(later[name], 0.5)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(tensor, weights[-1][name])
    run(config, again, "--resume", str(checkpoints[5]))
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (path / "checkpoints/step-00000008" / file for path in (out, again))
        assert a.read_bytes() == b.read_bytes(), file

    with pytest.raises(UsageError, match=r"step-00000004: holds no average"):
        load_model(checkpoints[3], average=True)
    export(["--checkpoint", str(out), "--average", "--out", str(tmp_path / "exported")])
    exported = dict(load_model(tmp_path / "exported")[0].named_parameters())
    assert all(torch.equal(exported[name], tensor) for name, tensor in found.items())
    with pytest.raises(UsageError, match="an exported model"):
        load_model(tmp_path / "exported", average=True)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on mat\n" * 8)
    losses = []
    for path, flags in ((out, []), (out, ["--average"]), (tmp_path / "exported", [])):
        capsys.readouterr()
        evaluate(["--checkpoint", str(path), "--task", "perplexity", "--source", str(text),
                  "--json", "--device", "cpu", *flags])  # fmt: skip
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[1] == losses[2] != losses[0]


@pytest.mark.slow(5)
def test_an_outlier_is_logged_and_a_run_continues_with_its_window(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Row by row and bitwise, wherever the run was stopped; the limit is one that is exceeded."""
    config = tiny_config(
        model=SMALL,
        optim={"skip_norm_z": 1.5, "schedule": "constant", "warmup_steps": 0},
        train={"steps": 150, "batch_tokens": 64, "checkpoint_every": 130, "eval_every": 0},
    )
    rows = run(config, tmp_path / "whole")
    assert {row["skipped"] for row in rows[:127]} == {False}
    assert {row["grad_norm_z"] for row in rows[:127]} == {None}
    for row in rows[127:]:
        assert row["skipped"] == (row["grad_norm_z"] > 1.5)
    assert any(row["skipped"] for row in rows)
    stopped = tmp_path / "whole/checkpoints/step-00000130"
    assert run(config, tmp_path / "again", "--resume", str(stopped)) == rows[130:]
