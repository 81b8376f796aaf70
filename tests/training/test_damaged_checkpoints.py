"""A damaged newest checkpoint: the run continues from the one before, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_dist.checkpoints.checkpoint import newest_checkpoint, read_state, verify
from gpt_dist.config.settings import Config
from gpt_dist.data.loader import open_datasets
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.training import run_directory
from gpt_dist.training.run_directory import RunDirectory
from gpt_dist.training.setup import with_vocabulary
from gpt_dist.training.starting_point import DamagedError, Start, find_start
from gpt_dist.training.trainer import train_here
from tests.conftest import read_rows, run_train
from tests.training.conftest import ALONE, changed

FILES = ("model.safetensors", "optimizer.safetensors", "tokenizer.json", "state.json")


def checkpoint(config: Config, step: int) -> Path:
    return Path(config.out_dir) / f"checkpoints/step-{step:08d}"


def flip(path: Path) -> None:
    """Change one byte in the middle; of state.json, to one that is not JSON."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if path.name != "state.json" else 0] ^= 0x55
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def tensors(checkpoint: Path) -> list[bytes]:
    return [(checkpoint / name).read_bytes() for name in FILES[:2]]


def start_of(config: Config) -> Start | None:
    config = with_vocabulary(config, open_datasets(config)[0].tokenizer)
    return find_start(Path(config.out_dir), config, None)


@pytest.mark.slow(2)
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_seen_and_the_one_before_continues(
    finished: Config, name: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint(finished, 20) / name)
    before = contents(Path(finished.out_dir))
    start = start_of(finished)
    assert start is not None
    assert start.path == checkpoint(finished, 10)
    assert start.damaged == (checkpoint(finished, 20),)
    (line,) = start.notes
    assert line.startswith(f"damaged: {checkpoint(finished, 20) / name}") or name == "state.json"
    for part in (name, "step-00000010", "step-00000020.damaged"):
        assert part in line
    assert "\n" not in line
    assert contents(Path(finished.out_dir)) == before  # only looking changes nothing


@pytest.mark.slow(2)
def test_the_run_ends_like_one_without_damage(
    finished: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(finished.out_dir)
    rows, good = read_rows(out, timing=False), tensors(checkpoint(finished, 20))
    flip(checkpoint(finished, 20) / "optimizer.safetensors")
    damaged = contents(checkpoint(finished, 20))
    train_here(finished, ALONE, lambda: False)
    text = capsys.readouterr().out
    assert text.startswith(f"continuing {checkpoint(finished, 10)}")
    assert text.count("damaged: ") == 1
    assert read_rows(out, timing=False) == rows
    assert tensors(checkpoint(finished, 20)) == good
    assert contents(out / "checkpoints/step-00000020.damaged") == damaged
    assert (out / "checkpoints/best").resolve() == checkpoint(finished, 20)
    # Damaged again: the first one is kept too.
    truncate(checkpoint(finished, 20) / "model.safetensors")
    train_here(finished, ALONE, lambda: False)
    assert tensors(checkpoint(finished, 20)) == good
    assert contents(out / "checkpoints/step-00000020.damaged") == damaged
    assert (out / "checkpoints/step-00000020.damaged-2").is_dir()


@pytest.mark.slow(5)
def test_best_never_points_to_nothing(finished: Config) -> None:
    """Set aside, the damaged checkpoint takes the link with it."""
    out = Path(finished.out_dir)
    assert (out / "checkpoints/best").resolve() == checkpoint(finished, 20)
    flip(checkpoint(finished, 20) / "model.safetensors")
    config = with_vocabulary(finished, open_datasets(finished)[0].tokenizer)
    with RunDirectory(out) as directory:
        fingerprint = read_state(checkpoint(finished, 10))["fingerprint"]
        assert directory.claim(config, fingerprint, ALONE)
        assert (out / "checkpoints/best").resolve() == checkpoint(finished, 20)
        directory.write_config(config)
    assert (out / "checkpoints/best").resolve() == checkpoint(finished, 10)
    assert newest_checkpoint(out / "checkpoints") == checkpoint(finished, 10)


def test_the_earlier_checkpoint_by_name(finished: Config) -> None:
    """--resume of the one before is refused only while a later one is whole."""
    asked = changed(finished, resume=str(checkpoint(finished, 10)))
    with pytest.raises(UsageError, match=r"holds later checkpoints \(step-00000020\)"):
        start_of(asked)
    flip(checkpoint(finished, 20) / "model.safetensors")
    start = start_of(asked)
    assert start is not None
    assert (start.path, start.damaged) == (checkpoint(finished, 10), (checkpoint(finished, 20),))
    with pytest.raises(DamagedError, match=r"model\.safetensors.*resume = auto continues from"):
        start_of(changed(finished, resume=str(checkpoint(finished, 20))))


def test_nothing_whole_is_left(finished: Config) -> None:
    for step in (10, 20):
        truncate(checkpoint(finished, step) / "model.safetensors")
    before = contents(Path(finished.out_dir))
    with pytest.raises(
        GptDistError, match=r"step-00000020/model\.safetensors.*no earlier"
    ) as raised:
        train_here(finished, ALONE, lambda: False)
    assert raised.value.exit_status == 1
    assert contents(Path(finished.out_dir)) == before


def test_a_replaced_checkpoint_is_better_than_an_earlier_one(finished: Config) -> None:
    """The process was killed while step 20 was saved again, and the new files are damaged."""
    again = checkpoint(finished, 20)
    shutil.copytree(again, again.with_name("step-00000020.replaced"))
    flip(again / "model.safetensors")
    start = start_of(finished)
    assert start is not None
    assert start.path.name == "step-00000020.replaced"
    good = contents(start.path)
    train_here(changed(finished, train=finished.train.model_copy(update={"steps": 21})), ALONE,
               lambda: False)  # fmt: skip
    names = {path.name for path in again.parent.iterdir()}
    assert {"step-00000020", "step-00000020.damaged", "step-00000021"} <= names
    assert contents(again) == good


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), TimeoutError(110, "")])
def test_a_file_that_cannot_be_read_is_not_damaged(
    finished: Config, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """Going on from an earlier checkpoint would lose steps for nothing."""

    def refuse(path: Path) -> str:
        raise error

    monkeypatch.setattr("gpt_dist.checkpoints.checkpoint.file_sha256", refuse)
    with pytest.raises(GptDistError) as raised:
        start_of(finished)
    assert not isinstance(raised.value, DamagedError)


def test_a_later_format_is_not_damage(finished: Config) -> None:
    path = checkpoint(finished, 20) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(GptDistError, match="format_version 99"):
        start_of(finished)


def test_a_setting_that_differs_is_refused_before_any_rename(finished: Config) -> None:
    flip(checkpoint(finished, 20) / "model.safetensors")
    before = contents(Path(finished.out_dir))
    with pytest.raises(UsageError, match="seed = 9"):
        train_here(changed(finished, seed=9), ALONE, lambda: False)
    assert contents(Path(finished.out_dir)) == before


@pytest.mark.slow(2)
def test_an_older_damaged_checkpoint_does_not_stop_the_run(finished: Config) -> None:
    """Only the newest is read; the writer asks the older one whether it was the best."""
    (checkpoint(finished, 10) / "state.json").write_text("{")
    path = checkpoint(finished, 20) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"best": False}))
    longer = changed(finished, train=finished.train.model_copy(update={"steps": 21}))
    train_here(longer, ALONE, lambda: False)
    assert checkpoint(finished, 21).is_dir()


def test_damage_is_found_under_the_lock(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def find(directory: Path, *args: Any, **options: Any) -> Start | None:
        with pytest.raises(GptDistError, match="another run is writing"):
            run_directory.lock_file(directory)
        held.append(directory)
        return find_start(directory, *args, **options)

    monkeypatch.setattr(run_directory, "LOCK_WAIT", 0.0)
    monkeypatch.setattr(run_directory, "find_start", find)
    config = with_vocabulary(finished, open_datasets(finished)[0].tokenizer)
    with RunDirectory(Path(finished.out_dir)) as directory:
        fingerprint = read_state(checkpoint(finished, 10))["fingerprint"]
        directory.claim(config, fingerprint, ALONE)
    assert held


@pytest.mark.slow
def test_all_ranks_fall_back_together(
    finished: Config, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    out = Path(finished.out_dir)
    flip(checkpoint(finished, 20) / "model.safetensors")
    done = run_train(tiny_config(), out, ranks=2)
    assert done.stdout.count("damaged: ") == 1
    assert done.stdout.count(f"continuing {checkpoint(finished, 10)}") == 1
    assert (out / "checkpoints/step-00000020.damaged").is_dir()
    verify(checkpoint(finished, 20), read_state(checkpoint(finished, 20)))
