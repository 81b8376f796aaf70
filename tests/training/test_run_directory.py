"""Who may write to a run's directory, and where a run continues; all in this process."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_dist.checkpoints.checkpoint import newest_checkpoint, read_state
from gpt_dist.config.command_line import load
from gpt_dist.config.settings import Config
from gpt_dist.data.loader import open_datasets
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.parallel.world import World
from gpt_dist.training import run_directory
from gpt_dist.training.run_directory import RunDirectory, lock_file
from gpt_dist.training.setup import with_vocabulary
from gpt_dist.training.starting_point import Start, check_same_run
from tests.training.conftest import ALONE, changed

WriteConfig = Callable[..., Path]


def fingerprint_of(config: Config) -> str:
    newest = newest_checkpoint(Path(config.out_dir) / "checkpoints")
    assert newest
    fingerprint: str = read_state(newest)["fingerprint"]
    return fingerprint


def claim(config: Config, fingerprint: str, world: World = ALONE) -> Start | None:
    """Where the run would continue; the claim is given up again."""
    with RunDirectory(Path(config.out_dir)) as directory:
        return directory.claim(with_sizes(config), fingerprint, world)


def with_sizes(config: Config) -> Config:
    """The configuration as ``setup`` hands it on."""
    return with_vocabulary(config, open_datasets(config)[0].tokenizer)


def start_of(config: Config, world: World = ALONE) -> str | None:
    start = claim(config, fingerprint_of(config), world)
    return start.path.name if start else None


@pytest.mark.slow(5)
def test_the_lock_comes_before_the_choice(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that held the lock wrote a later checkpoint while this one waited."""
    fingerprint = fingerprint_of(finished)
    later = Path(finished.out_dir) / "checkpoints/step-00000020"
    later.rename(tmp_path / "aside")
    other = lock_file(Path(finished.out_dir))

    def meanwhile(_: float) -> None:
        if not later.exists():
            (tmp_path / "aside").rename(later)
        other.close()

    monkeypatch.setattr(run_directory.time, "sleep", meanwhile)
    start = claim(finished, fingerprint)
    assert start
    assert start.path == later
    assert start.state["step"] == 20


def test_every_rank_takes_rank_0s_choice(finished: Config) -> None:
    class Follower(World):
        """A rank that is told what rank 0 found."""

        def decide(self, work: object) -> None:
            return None

        def broadcast(self, value: object) -> Any:
            return told.pop(0)

    run = Path(finished.out_dir)
    shutil.move(run / "checkpoints/step-00000010", run / "checkpoints/step-00000030")
    (run / ".lock").write_text("process 1 on other, token\n")
    chosen = Start(run / "checkpoints/step-00000020", {"step": 20})
    told = ["token", chosen]
    follower = Follower(rank=1, size=1, local_rank=1, local_size=1, device=torch.device("cpu"))
    assert claim(finished, "", follower) is chosen
    assert not told


def test_two_writers(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "LOCK_WAIT", 0.0)
    out = Path(config.out_dir)
    with RunDirectory(out) as first:
        assert first.claim(config, "", ALONE) is None
        with pytest.raises(GptDistError, match="another run is writing here"):
            claim(config, "")
        assert (out / ".lock").exists()
    assert not out.exists()  # nothing was written: nothing stays


def test_a_lock_file_that_is_removed_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder ends, and removes it, after this process opened it: a lock on it is worthless."""
    flock = fcntl.flock

    def meanwhile(handle: Any, operation: int) -> None:
        monkeypatch.setattr(run_directory.fcntl, "flock", flock)
        (tmp_path / ".lock").unlink()
        flock(handle, operation)

    monkeypatch.setattr(run_directory.fcntl, "flock", meanwhile)
    held = lock_file(tmp_path)
    with (tmp_path / ".lock").open() as again, pytest.raises(BlockingIOError):
        flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    held.close()


def test_a_refused_start_leaves_nothing(config: Config, tmp_path: Path) -> None:
    new = changed(config, out_dir=str(tmp_path / "a/b"), resume=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no such run"):
        claim(new, "")
    assert not (tmp_path / "a").exists()


# Each case: the environment of the first start, that of the second, and whether it is a restart.
RESTARTS = [
    ({}, {}, False),
    ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
    ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),  # twice in one allocation
    ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
    ({}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
    (
        {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"},
        True,
    ),
    ({"agents": "a a b b"}, {"agents": "a a b b"}, True),  # a crash
    ({"agents": "a a b b"}, {"agents": "b b"}, True),  # a node left
    ({"agents": "b b"}, {"agents": "a a b b"}, True),  # a node came, and is the first now
    ({"agents": "a a b b"}, {"agents": "c c d d"}, False),
]


@dataclass(frozen=True)
class SeveralAgents(World):
    """World rank 0 of ranks that these torchrun agents started."""

    agents: list[str] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        return self.agents if value == "" else [value]


@pytest.mark.parametrize(("first", "second", "restarted"), RESTARTS)
@pytest.mark.parametrize("resume", ["never", "elsewhere"])
def test_a_restarted_launch_continues_its_own_run(
    finished: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resume: str,
    first: dict[str, str],
    second: dict[str, str],
    restarted: bool,
) -> None:
    def launch(environment: dict[str, str]) -> World:
        """The ranks of a start in this environment."""
        agents = environment.get("agents", "").split(" ")
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        for name in environment.keys() - {"agents"}:
            monkeypatch.setenv(name, environment[name])
        world = SeveralAgents(rank=0, size=1, local_rank=0, local_size=1, device=ALONE.device)
        world.agents.extend(agents)
        return world

    if resume == "elsewhere":
        shutil.copytree(finished.out_dir, tmp_path / "elsewhere", symlinks=True)
        resume = str(tmp_path / "elsewhere/checkpoints/step-00000010")
    config = changed(finished, resume=resume)
    with RunDirectory(Path(config.out_dir)) as directory:
        ranks, free = launch(first), changed(config, resume="auto")
        directory.claim(with_sizes(free), fingerprint_of(config), ranks)
        directory.write_config(config)
    mark = (Path(config.out_dir) / ".launch").read_bytes()
    ranks = launch(second)
    if restarted:
        assert start_of(config, ranks) == "step-00000020"
    else:
        with pytest.raises(UsageError, match=r"already holds a run|holds later checkpoints"):
            start_of(config, ranks)
    assert (Path(config.out_dir) / ".launch").read_bytes() == mark
    assert start_of(changed(config, resume="auto")) == "step-00000020"


def test_a_damaged_mark_is_no_mark(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Path(finished.out_dir) / ".launch").is_file()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for text in ("{", "[]", "null", '{"slurm_job": "7", "slurm_restarts": "x"}'):
        (Path(finished.out_dir) / ".launch").write_text(text)
        with pytest.raises(UsageError, match="already holds a run"):
            start_of(changed(finished, resume="never"))


def test_ranks_and_batch_may_change_together(
    finished: Config, tiny_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saved batch of 1024 tokens does not divide over 3 ranks; the new one does."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    path = str(tiny_config(train={"batch_tokens": 960}))
    now = load(["--config", path, "--out_dir", finished.out_dir])[0]
    assert start_of(now) == "step-00000020"
    with pytest.raises(UsageError, match=r"seed = 5: the run in .* has 1"):
        start_of(changed(now, seed=5))


@pytest.mark.parametrize("kind", ["imported", "exported"])
def test_weights_alone_cannot_be_resumed(
    finished: Config, config: Config, tmp_path: Path, kind: str
) -> None:
    source = tmp_path / kind
    source.mkdir()
    if kind == "imported":
        model = config.model.model_dump() | {"vocab_size": 21}
        state = {"format_version": 1, "step": 0, "config": {"model": model}, "files": {}}
        (source / "state.json").write_text(json.dumps(state))
    else:
        (source / "config.json").write_text("{}")
    for out_dir in (finished.out_dir, str(tmp_path / "new")):
        again = changed(config, resume=str(source), out_dir=out_dir)
        with pytest.raises(UsageError, match=f"--train.init_from {source}") as refused:
            claim(again, "")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_a_saved_configuration_that_cannot_be_read(finished: Config) -> None:
    state = {"config": {"train": {"steps": "many"}}, "fingerprint": ""}
    with pytest.raises(GptDistError, match=r"x/state.json: .*train.steps = many"):
        check_same_run(finished, state, "", Path("x"))
