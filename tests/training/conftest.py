"""One finished run that the tests of a run's directory copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_dist.config.command_line import load
from gpt_dist.config.settings import Config
from gpt_dist.parallel.world import World
from gpt_dist.training.trainer import train_here

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
LAUNCH = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")


def changed(config: Config, **values: Any) -> Config:
    return config.model_copy(update=values)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Slurm nor torchrun."""
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tiny_config: Callable[..., Path], tmp_path: Path) -> Config:
    flags = ["--config", str(tiny_config()), "--out_dir", str(tmp_path / "run")]
    return load(flags)[0]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the only training run goes."""
    return tmp_path_factory.mktemp("template") / "run"


@pytest.fixture
def finished(config: Config, template: Path) -> Config:
    """The configuration of a finished run, with checkpoints of steps 10 and 20."""
    if not template.exists():
        train_here(changed(config, out_dir=str(template)), ALONE, lambda: False)
    shutil.copytree(template, config.out_dir, symlinks=True)
    return config
