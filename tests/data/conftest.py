"""Fixtures of the tests of ``prepare``."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt_dist.text.tokenizers import END_OF_TEXT
from tests.data.helpers import FLAGS, run, snapshot, stories


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few megabytes, enough for several chunks, in short and long documents."""
    place = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        text = f"\n{END_OF_TEXT}\n".join(stories(3000, number))
        (place / f"{number}.txt").write_text(text)
    (place / "3.txt").write_text("a long one, " * 200_000)
    return place


@pytest.fixture(scope="session")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "out"
    run("text", corpus, *FLAGS, "--workers", 1, "--out", out)
    assert len(list(out.glob("*_train_*.bin"))) > 5
    assert len(list(out.glob("*_val_*.bin"))) > 1
    return snapshot(out)
