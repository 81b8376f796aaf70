"""Checkpoints survive a kill at any instant, and a damaged file is named."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gpt_dist.checkpoints.writer
from gpt_dist.checkpoints.checkpoint import (
    complete_checkpoints,
    newest_checkpoint,
    read_state,
    resolve,
    step_name,
    verify,
)
from gpt_dist.checkpoints.directory import CheckpointDirectory
from gpt_dist.checkpoints.reader import load_model
from gpt_dist.checkpoints.tensor_files import TensorFile
from gpt_dist.checkpoints.writer import CheckpointWriter, write_checkpoint
from gpt_dist.config.settings import Config, ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import CharTokenizer
from tests.conftest import fork

TOKENIZER = CharTokenizer("abcdefgh")
SHAPE = ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=8, vocab_size=8)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    named = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    moments = {f"optimizer.exp_avg.{name}": p.detach() + 1 for name, p in model.named_parameters()}
    return {**named, **moments, "optimizer.step": torch.tensor(float(seed))}


def state(step: int) -> dict[str, Any]:
    config = Config().model_dump() | {"model": SHAPE.model_dump()}
    return {"step": step, "config": config, "fingerprint": "f"}


def save(writer: CheckpointWriter, step: int, *, best: bool = False) -> None:
    named = iter(tensors(step).items())
    writer.save(named, state(step), TOKENIZER, vocab_size=8, best=best, write=True)
    writer.wait()


def test_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    save(CheckpointWriter(tmp_path, keep=2), 3)
    directory = tmp_path / "step-00000003"
    expected = tensors(3)
    for part in ("model", "optimizer"):
        read = load_file(directory / f"{part}.safetensors")
        names = {n.removeprefix(f"{part}.") for n in expected if n.startswith(f"{part}.")}
        assert set(read) == names
        for name, tensor in read.items():
            full = expected[f"{part}.{name}"]
            if name.endswith("wte.weight"):
                assert tensor.shape[0] == 8  # without the padding
                full = full[:8]
            assert torch.equal(tensor, full), name
    found = read_state(directory)
    assert found["step"] == 3
    assert set(found["files"]) == {"model.safetensors", "optimizer.safetensors", "tokenizer.json"}
    verify(directory, found)


class Killed(BaseException):
    """As if the process ended right before an operation."""


OPERATIONS = ("fsync", "rename", "rmdir", "unlink", "mkdir", "symlink", "replace")


def die_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """End the process right before its ``number``-th operation on the file system."""
    count = [0]

    def guard(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] >= number:
                os._exit(77)
            return original(*args, **kwargs)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    return count


def killed_at_every_operation(
    monkeypatch: pytest.MonkeyPatch, base: Path, step: int, *, best: bool
) -> Iterator[Path]:
    """Copies of ``base``, in each of which saving a step died one operation later."""
    number, finished = 0, False
    while not finished:
        number += 1
        directory = base.with_name(f"killed-{number}")
        shutil.copytree(base, directory, symlinks=True)
        child = fork()
        if child == 0:
            die_at(monkeypatch, number)
            try:
                doomed = CheckpointWriter(directory, keep=2)
                doomed._write(tensors(step + 10), state(step), TOKENIZER, best)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 77)
        finished = status == 0
        yield directory
    assert number > 18  # five of them write, the others move and remove


def check_readers(directory: Path) -> list[int]:
    """Whatever readers find is complete, ``best`` too; returns the steps they find."""
    found = complete_checkpoints(directory)
    for checkpoint in found:
        verify(checkpoint, read_state(checkpoint))
    steps = [read_state(checkpoint)["step"] for checkpoint in found]
    assert steps == sorted(set(steps))
    assert resolve(directory / "best") in [checkpoint.resolve() for checkpoint in found]
    for step in steps:
        assert read_state(resolve(directory / f"step-{step:08d}"))["step"] == step
    assert resolve(directory) == found[-1]
    return steps


def check_next_start(directory: Path) -> None:
    """The next start clears away what was left half done, and goes on."""
    save(CheckpointWriter(directory, keep=2), 4)
    names = sorted(path.name for path in directory.iterdir())
    assert all(name == "best" or name.removeprefix("step-").isdigit() for name in names), names
    assert newest_checkpoint(directory) == directory / "step-00000004"
    check_readers(directory)


@pytest.mark.slow(2)
@pytest.mark.parametrize("best", [False, True])
def test_killed_at_every_operation_of_writing_and_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: bool
) -> None:
    """A child writes checkpoint 3 beside 1 and 2 and dies at its n-th operation, for all n."""
    base = tmp_path / "base"
    writer = CheckpointWriter(base, keep=2)
    save(writer, 1)
    save(writer, 2, best=True)
    for directory in killed_at_every_operation(monkeypatch, base, 3, best=best):
        steps = check_readers(directory)
        assert 2 in steps
        check_next_start(directory)
        best_step = 3 if best and 3 in steps else 2
        assert read_state(directory / "best")["step"] == best_step


@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("was_best", [False, True])
def test_killed_at_every_operation_of_saving_a_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_best: bool, best: bool
) -> None:
    """A child writes checkpoint 2 a second time: one of the two is there at every instant."""
    base = tmp_path / "base"
    writer = CheckpointWriter(base, keep=2)
    save(writer, 1, best=True)
    save(writer, 2, best=was_best)
    before = (base / "step-00000002/model.safetensors").read_bytes()
    versions = set()
    for directory in killed_at_every_operation(monkeypatch, base, 2, best=best):
        assert check_readers(directory) == [1, 2]
        now = resolve(directory / "step-00000002") / "model.safetensors"
        versions.add(now.read_bytes())
        check_next_start(directory)
        weights = directory / "step-00000002/model.safetensors"
        assert weights.read_bytes() in versions
    assert before in versions
    assert len(versions) == 2
    assert weights.read_bytes() != before


def test_a_step_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    save(writer, 2, best=True)
    before = read_state(tmp_path / "step-00000002")["files"]
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.name == ".writing-step-00000002":
            raise OSError(errno.EIO, "Input/output error", str(source))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(GptDistError, match=r"newest complete one is .*step-00000002"):
        save(writer, 2)
    assert read_state(tmp_path / "best")["files"] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000002"]


def test_killed_at_every_operation_of_setting_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is lost, and what was not renamed yet is renamed by the next start."""
    base = tmp_path / "base"
    writer = CheckpointWriter(base, keep=3)
    for step in (1, 2, 3):
        save(writer, step, best=True)
    weights = {n: (base / step_name(n) / "model.safetensors").read_bytes() for n in (1, 2, 3)}
    number, status = 0, 77
    while status:
        number += 1
        directory = tmp_path / f"killed-{number}"
        shutil.copytree(base, directory, symlinks=True)
        child = fork()
        if child == 0:
            die_at(monkeypatch, number)
            try:
                CheckpointDirectory(directory, 3).set_aside(
                    directory / step_name(step) for step in (3, 2)
                )
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 77)
        for step, expected in weights.items():
            names = [step_name(step), f"{step_name(step)}.damaged"]
            (kept,) = [directory / name for name in names if (directory / name).exists()]
            assert (kept / "model.safetensors").read_bytes() == expected
        CheckpointDirectory(directory, 3).set_aside(complete_checkpoints(directory)[1:])
        assert complete_checkpoints(directory) == [directory / step_name(1)]
        assert resolve(directory / "best").name == step_name(1)
    assert number > 6


@pytest.mark.parametrize("kind", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "state.json"])
def test_damage_is_named(tmp_path: Path, kind: str, name: str) -> None:
    save(CheckpointWriter(tmp_path / "checkpoints", keep=2), 3)
    file = tmp_path / "checkpoints/step-00000003" / name
    data = bytearray(file.read_bytes())
    if kind == "flip":
        data[0] ^= 0x55
    file.write_bytes(data[:-5] if kind == "truncate" else data)
    if kind == "remove":
        file.unlink()
    with pytest.raises((GptDistError, UsageError), match=name.replace(".", r"\.")):
        load_model(tmp_path)


def test_tensors_of_another_shape_or_name_are_refused(tmp_path: Path) -> None:
    for change, message in (
        (lambda t: t.pop("model.ln_f.weight"), "lacks the tensor ln_f.weight"),
        (lambda t: t.update({"model.extra": torch.zeros(2)}), "contains a tensor .* extra"),
        (lambda t: t.update({"model.wpe.weight": torch.zeros(9, 8)}), r"wpe.weight .*\[9, 8\]"),
    ):
        directory = tmp_path / message[:4].strip()
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        named = {n: t[:8] if "wte" in n else t for n, t in tensors(1).items()}
        change(named)
        write_checkpoint(directory, named, state(1), TOKENIZER)
        with pytest.raises(GptDistError, match=message):
            load_model(directory)


def test_a_pickle_is_not_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(GptDistError, match="not a complete safetensors file"):
        TensorFile(tmp_path / "model.safetensors")


def test_resolver(tmp_path: Path) -> None:
    run = tmp_path / "run"
    writer = CheckpointWriter(run / "checkpoints", keep=2)
    save(writer, 1, best=True)
    save(writer, 2)
    assert resolve(run).name == "step-00000002"
    assert resolve(run / "checkpoints").name == "step-00000002"
    assert resolve(run / "checkpoints/best").name == "step-00000001"
    assert resolve(run / "checkpoints/step-00000001").name == "step-00000001"
    (run / "checkpoints/.writing-step-00000009").mkdir()
    assert resolve(run).name == "step-00000002"
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match=str(bad)):
            resolve(bad)


def test_a_full_disk_ends_the_run_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    save(writer, 1)

    def full(path: Path, chunks: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(gpt_dist.checkpoints.writer, "write_file", full)
    with pytest.raises(
        GptDistError, match=r"No space left.*newest complete one is .*step-00000001"
    ):
        save(writer, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_every_nth_checkpoint_stays(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=3)
    for step in range(1, 10):
        save(writer, step, best=step == 4)
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == [f"step-{step:08d}" for step in (3, 4, 6, 8, 9)]


class OnDevice(torch.Tensor):
    """A tensor that claims to be on another device, whose asynchronous copies come late.

    As on MPS: until the device is synchronised, the target of such a copy holds what it held.
    """

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("mps")

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.copy_ and (kwargs or {}).get("non_blocking"):
            return args[0]
        return super().__torch_function__(function, kinds, args, kwargs or {})


def test_copies_from_mps_have_arrived_before_they_are_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    save(writer, 1)  # makes the buffers, with other values
    expected = tensors(2)
    there = {name: tensor.as_subclass(OnDevice) for name, tensor in expected.items()}
    writer.save(iter(there.items()), state(2), TOKENIZER, vocab_size=8, best=False, write=True)
    writer.wait()
    read = load_file(tmp_path / "step-00000002/optimizer.safetensors")
    for name, tensor in read.items():
        whole = expected[f"optimizer.{name}"]
        assert torch.equal(tensor, whole[:8] if name.endswith("wte.weight") else whole), name
