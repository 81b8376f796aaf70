"""Checkpoints survive being killed anywhere, and damaged ones are named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpt_dist.checkpoints.checkpoint import (
    CheckpointWriter,
    complete_checkpoints,
    load_model,
    newest_checkpoint,
    read_state,
    resolve,
    verify,
    write_checkpoint,
)
from gpt_dist.checkpoints.tensor_files import TensorFile
from gpt_dist.config.settings import Config, ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import CharTokenizer

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
    """Let the ``number``-th operation on the file system, and all after it, never happen."""
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


@pytest.mark.parametrize("best", [False, True])
def test_killed_at_every_operation_of_writing_and_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: bool
) -> None:
    """A child writes checkpoint 3 beside 1 and 2 and dies at its n-th operation, for all n."""
    base = tmp_path / "base"
    writer = CheckpointWriter(base, keep=2)
    save(writer, 1)
    save(writer, 2, best=True)
    finished = False
    number = 0
    while not finished:
        number += 1
        directory = tmp_path / f"killed-{number}"
        shutil.copytree(base, directory, symlinks=True)
        child = os.fork()
        if child == 0:
            die_at(monkeypatch, number)
            try:
                doomed = CheckpointWriter(directory, keep=2)
                doomed._write(tensors(3), state(3), TOKENIZER, best)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 77)
        finished = status == 0
        found = complete_checkpoints(directory)
        for checkpoint in found:  # whatever bears the name is complete
            verify(checkpoint, read_state(checkpoint))
        steps = [read_state(checkpoint)["step"] for checkpoint in found]
        assert 2 in steps
        assert steps == sorted(set(steps))
        link = (directory / "best").resolve()
        assert link in [checkpoint.resolve() for checkpoint in found]  # never dangling
        # The next start clears what was left half done, and goes on.
        again = CheckpointWriter(directory, keep=2)
        save(again, 4)
        names = sorted(path.name for path in directory.iterdir())
        assert not [name for name in names if name.startswith(".")], names
        assert newest_checkpoint(directory) == directory / "step-00000004"
        best_step = 3 if best and 3 in steps else 2
        assert read_state(directory / "best")["step"] == best_step
    assert number > 18  # five of them write, the others move and remove


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
        (lambda t: t.update({"model.extra": torch.zeros(2)}), "has a tensor .* extra"),
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
    import errno

    import gpt_dist.checkpoints.checkpoint

    def full(path: Path, chunks: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(gpt_dist.checkpoints.checkpoint, "write_file", full)
    with pytest.raises(
        GptDistError, match=r"No space left.*newest complete one is .*step-00000001"
    ):
        save(writer, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
