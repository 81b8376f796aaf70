"""Kills and crashes at any moment: the same command completes the same data set."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.preparation import run as preparation
from gpt_dist.data.preparation import tokenize_pool
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.text.tokenizers import END_OF_TEXT
from tests.conftest import fork
from tests.data.helpers import (
    DEADLINE,
    FLAGS,
    journal_entry,
    refused,
    run,
    snapshot,
    start_prepare,
    step,
    stories,
    tokens,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 5])
def test_workers_do_not_matter(
    workers: int, corpus: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    run("text", corpus, *FLAGS, "--workers", workers, "--out", "out")
    assert snapshot(tmp_path / "out") == reference


@pytest.mark.slow
def test_killed_again_and_again(corpus: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL right after a journal entry, or during the work that follows it."""
    out = tmp_path / "out"
    command = ["text", corpus, *FLAGS, "--out", out]
    for kill, workers in enumerate((1, 2, 3, 1, 2)):
        process = start_prepare(*command, "--workers", workers)
        journal_entry(process)
        step(process)
        assert journal_entry(process) is not None, "the corpus is too small for so many kills"
        if kill % 2:
            step(process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=DEADLINE)
        assert refused(out)
    process = start_prepare(*command)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    assert "resuming after" in errors
    assert snapshot(out) == reference


def crash_at(number: int, *arguments: object) -> int:
    """Run prepare in a forked child that dies before its n-th fsync, rename or removal."""
    child = fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        calls = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        preparation.COMMIT_SECONDS = 0
        os._exit(run(*arguments))
    except BaseException:
        os._exit(3)


@pytest.mark.slow
def test_dying_at_every_step_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each fsync, rename and removal in turn; then the same command completes the data set."""
    monkeypatch.setattr(tokenize_pool, "CHUNK_CHARACTERS", 1 << 13)
    text = f"\n{END_OF_TEXT}\n".join(stories(100))
    (tmp_path / "x.txt").write_text(text)
    command = ["text", "x.txt", *FLAGS[:4], "--shard-tokens", "9k", "--workers", 1]
    run(*command, "--out", "whole")
    expected = snapshot(tmp_path / "whole")
    number, crashes = 0, 0
    while True:
        number += 1
        out = f"out{number}"
        status = crash_at(number, *command, "--out", out)
        if status == 0:
            break
        assert status == 9
        crashes += 1
        if (tmp_path / out / "dataset.json").exists():  # all was there, up to the tidying
            assert tokens(out) == tokens("whole")
        else:
            assert not (tmp_path / out).exists() or refused(tmp_path / out)
        run(*command, "--out", out)
        assert snapshot(tmp_path / out) == expected, number
    assert crashes > 30


@pytest.mark.slow
def test_dying_while_overwriting(tmp_path: Path) -> None:
    """At every moment the directory is the old data set, the new one, or visibly none."""
    (tmp_path / "x.txt").write_text("\n".join(stories(40)))
    old = ["text", "x.txt", "--split", "lines", "--workers", 1]
    new = [*old, "--seed", 5, "--overwrite"]
    run(*new, "--out", "new")
    expected = open_dataset("new").fingerprint
    for number in range(1, 1000):
        out = f"out{number}"
        run(*old, "--out", out)
        before = open_dataset(out).fingerprint
        status = crash_at(number, *new, "--out", out)
        if status == 0:
            break
        assert status == 9
        if not refused(tmp_path / out):
            assert open_dataset(out).fingerprint in (before, expected)
            assert run("inspect", out) == 0
        run(*new, "--out", out)
        assert open_dataset(out).fingerprint == expected
    assert number > 15


@pytest.mark.slow
def test_an_unfinished_other_data_set(corpus: Path, tmp_path: Path) -> None:
    process = start_prepare("text", corpus, *FLAGS, "--out", "out")
    while not journal_entry(process):
        step(process)
    with pytest.raises(GptDistError, match="out: another process is preparing data there"):
        run("text", corpus, *FLAGS, "--out", "out")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    with pytest.raises(UsageError, match=r"unfinished data set made with val_fraction = 0\.1, not"):
        run("text", corpus, "--split", "eot", "--out", "out")
    assert run("text", corpus / "0.txt", "--out", "out", "--overwrite") == 0
    assert run("inspect", "out") == 0


@pytest.mark.slow
def test_what_is_done_is_kept_when_a_later_file_is_bad(
    corpus: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "in"
    place.mkdir()
    for file in corpus.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    good = (place / "3.txt").read_bytes()
    (place / "3.txt").write_bytes(good[:2_000_000] + b"\xff" + good[2_000_001:])
    process = start_prepare("text", place, *FLAGS, "--out", "out")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "3.txt: not UTF-8: byte 2,000,000 is 0xff" in errors
    assert "documents are done and kept; run the same command to resume" in errors
    assert errors.count("\n") == 1
    assert refused(tmp_path / "out")
    (place / "3.txt").write_bytes(good)
    run("text", place, *FLAGS, "--out", "out")
    assert snapshot(tmp_path / "out") == reference
