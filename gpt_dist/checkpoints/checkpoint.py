"""Checkpoints: atomic, checksummed, portable between engines and world sizes; nothing is unpickled.

``checkpoints/step-00000100/`` holds ``model.safetensors``, ``optimizer.safetensors``,
``tokenizer.json`` and ``state.json``. It appears by one rename after everything in it is on disk,
and is renamed away before it is removed: whatever bears that name is complete. Readers trust
nothing else, and ``state.json`` lists the sha256 of the other files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_dist.checkpoints.tensor_files import TensorFile, safetensors_chunks, write_file
from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError, describe
from gpt_dist.files import file_sha256, sync_directory
from gpt_dist.model.gpt import GPT, VOCAB_PARAMETERS
from gpt_dist.text.tokenizers import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
NICENESS = 10
"""Of a thread that writes much: a ninth of a core at least, and whatever training leaves idle."""
LARGE = 100_000_000
"""Bytes of a checkpoint that takes more than a step to write; smaller ones are in nobody's way."""
STEP_DIRECTORY = re.compile(r"step-(\d{8})")


# --- writing ------------------------------------------------------------------------------------


def is_vocabulary(name: str) -> bool:
    """Whether a tensor's rows are tokens, so that its padding is cut off in files."""
    return any(name.endswith(f".{parameter}") for parameter in VOCAB_PARAMETERS)


class CheckpointWriter:
    """Writes ``directory``/step-XXXXXXXX in the background and keeps the newest and the best.

    Args:
        directory: ``OUT_DIR/checkpoints``.
        keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._swept = False

    def save(
        self,
        tensors: Iterator[tuple[str, Tensor]],
        state: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        best: bool,
        write: bool,
    ) -> None:
        """Copy the state to host memory now, write it in the background.

        Args:
            tensors: ``Engine.full_state()``; gathering it is collective.
            state: contents of ``state.json``, ``step`` among them.
            tokenizer: saved with the weights.
            vocab_size: rows of vocabulary tensors that are not padding.
            best: whether ``checkpoints/best`` shall point here.
            write: False on ranks that only take part in gathering.

        Raises:
            GptDistError: the checkpoint before could not be written.
        """
        self.wait()
        snapshot = {}
        for name, tensor in tensors:
            if not write:
                continue
            kept = tensor[:vocab_size] if is_vocabulary(name) else tensor
            buffer = self._buffers.get(name)
            if buffer is None:
                pinned = kept.device.type == "cuda"
                buffer = torch.empty(kept.shape, dtype=torch.float32, pin_memory=pinned)
                self._buffers[name] = buffer
            snapshot[name] = buffer.copy_(kept, non_blocking=True)
        if not write:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._thread = threading.Thread(
            target=self._guarded, args=(snapshot, state, tokenizer, best), name="checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what the last write failed with.

        Raises:
            GptDistError: the disk is full, say; earlier checkpoints are as they were.
        """
        if self._error is not None:
            error, self._error = self._error, None
            newest = newest_checkpoint(self.directory)
            left = f"the newest complete one is {newest}" if newest else "there is none yet"
            raise GptDistError(f"checkpoint not written: {describe(error)}; {left}") from error

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            GptDistError: the write failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Let the write that is under way finish, whatever else went wrong."""
        if self._thread is not None:
            self._thread.join()

    def _guarded(self, snapshot: dict[str, Tensor], *args: Any) -> None:
        # The step first: a niceness belongs to a thread on Linux, to the process elsewhere.
        if sys.platform == "linux" and sum(t.nbytes for t in snapshot.values()) > LARGE:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._write(snapshot, *args)
        except BaseException as error:  # reported by the next check()
            self._error = error

    def _write(
        self,
        snapshot: dict[str, Tensor],
        state: dict[str, Any],
        tokenizer: Tokenizer,
        best: bool,
    ) -> None:
        final = self.directory / f"step-{state['step']:08d}"
        temporary = self.directory / f".writing-{final.name}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        temporary.mkdir()
        try:
            write_checkpoint(temporary, snapshot, state | {"best": best}, tokenizer)
            if final.exists():  # an earlier attempt at the same step, from before a resume
                self._remove(final)
            temporary.rename(final)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(self.directory)
        if best:
            self._point_best_at(final)
        self._rotate()

    def _point_best_at(self, target: Path) -> None:
        link = self.directory / ".best"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.rename(self.directory / "best")
        sync_directory(self.directory)

    def _rotate(self) -> None:
        best = self.directory / "best"
        spared = best.resolve() if best.is_symlink() else None
        for old in complete_checkpoints(self.directory)[: -self.keep]:
            if old.resolve() != spared:
                self._remove(old)

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(f".removing-{path.name}")
        path.rename(doomed)
        sync_directory(self.directory)
        shutil.rmtree(doomed)

    def _sweep(self) -> None:
        """Clear, once, what an earlier process left half done when it was killed."""
        if self._swept:
            return
        for pattern in (".writing-*", ".removing-*"):
            for path in self.directory.glob(pattern):
                shutil.rmtree(path)
        (self.directory / ".best").unlink(missing_ok=True)
        for path in reversed(complete_checkpoints(self.directory)):
            if read_state(path).get("best"):
                if (self.directory / "best").resolve() != path.resolve():
                    self._point_best_at(path)
                break
        self._swept = True


def write_checkpoint(
    directory: Path, tensors: dict[str, Tensor], state: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Write the files of a checkpoint into an existing, empty directory, through to the disk."""
    files = {}
    for part in ("model", "optimizer"):
        prefix = f"{part}."
        chosen = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if chosen:
            name = f"{part}.safetensors"
            files[name] = write_file(directory / name, safetensors_chunks(chosen))
    tokenizer.save(directory)
    files["tokenizer.json"] = file_sha256(directory / "tokenizer.json")
    whole = {"format_version": FORMAT_VERSION, **state, "files": files}
    write_file(directory / "state.json", [json.dumps(whole, indent=1).encode()])
    sync_directory(directory)


# --- finding and reading ------------------------------------------------------------------------


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if STEP_DIRECTORY.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def newest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = complete_checkpoints(directory)
    return found[-1] if found else None


def resolve(path: str | Path) -> Path:
    """What every ``--checkpoint`` means: the directory to load.

    A run's directory stands for its newest checkpoint; a checkpoint's directory (``best`` too) and
    an exported Hugging Face directory stand for themselves.

    Raises:
        UsageError: there is nothing to load.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path}: no such run, checkpoint or model directory")
    if (path / "state.json").is_file() or (path / "config.json").is_file():
        return path.resolve()
    for directory in (path / "checkpoints", path):
        newest = newest_checkpoint(directory)
        if newest:
            return newest
    raise UsageError(
        f"{path}: holds no complete checkpoint; expected a run directory (checkpoints/step-…), "
        "a checkpoint (state.json) or an exported model (config.json)"
    )


def read_state(directory: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        GptDistError: it is missing, not JSON, or of a later format.
    """
    path = directory / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = state["format_version"]
        ModelConfig.model_validate(state["config"]["model"])
    except OSError as error:
        raise GptDistError(describe(error)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise GptDistError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if version != FORMAT_VERSION:
        raise GptDistError(f"{path}: format_version {version}; this version reads {FORMAT_VERSION}")
    return state


def verify(directory: Path, state: dict[str, Any], *, optimizer: bool = True) -> None:
    """Compare the files of a checkpoint with their checksums; ``optimizer`` files if wanted.

    Raises:
        GptDistError: naming the file that is missing or was changed.
    """
    for name, expected in state["files"].items():
        if name == "optimizer.safetensors" and not optimizer:
            continue
        path = directory / name
        if not path.is_file():
            raise GptDistError(f"{path}: missing from the checkpoint")
        if file_sha256(path) != expected:
            raise GptDistError(f"{path}: does not match its checksum; the file is damaged")


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Add zero rows up to ``rows``: a vocabulary tensor as the model holds it."""
    missing = rows - tensor.shape[0]
    return (
        torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing > 0 else tensor
    )


class CheckpointReader:
    """The tensors of a checkpoint's files, by the names of ``Engine.full_state``."""

    def __init__(self, directory: Path, model: GPT) -> None:
        self._files = {
            part: TensorFile(directory / f"{part}.safetensors") for part in ("model", "optimizer")
        }
        self._rows = model.wte.weight.shape[0]

    def __call__(self, name: str) -> Tensor:
        part, _, key = name.partition(".")
        tensor = self._files[part](key)
        return pad_rows(tensor, self._rows) if is_vocabulary(name) else tensor

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter, tensor) of the whole model, without vocabulary padding."""
        file = self._files["model"]
        return ((name, file(name)) for name in sorted(file.names))


def load_weights(model: GPT, tensors: Iterable[tuple[str, Tensor]], source: object) -> None:
    """Copy named tensors into a model; every parameter must be there, in its shape.

    Raises:
        GptDistError: naming the parameter that is missing, unknown or misshapen.
    """
    wanted = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            parameter = wanted.pop(name, None)
            if parameter is None:
                raise GptDistError(f"{source}: has a tensor that this model has not: {name}")
            full = pad_rows(tensor, parameter.shape[0]) if name in VOCAB_PARAMETERS else tensor
            if full.shape != parameter.shape:
                raise GptDistError(
                    f"{source}: {name} has the shape {list(tensor.shape)}, "
                    f"this model's has {list(parameter.shape)}"
                )
            parameter.copy_(full)
    if wanted:
        raise GptDistError(f"{source}: lacks the tensor {min(wanted)}")


def empty_model(config: ModelConfig) -> GPT:
    """A model whose weights are not drawn, because they are about to be loaded."""
    with torch.device("meta"):
        model = GPT(config)
    return model.to_empty(device="cpu")


def load_model(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Load weights for inference or fine-tuning from anything that ``resolve`` accepts.

    Returns:
        The model in evaluation mode, its tokenizer, and ``state.json`` (for an exported model a
        dictionary with ``config`` alone).

    Raises:
        UsageError: there is nothing to load.
        GptDistError: a file is missing, damaged or of another model.
    """
    directory = resolve(path)
    if (directory / "config.json").is_file():
        from gpt_dist.formats.hf import load_pretrained  # only exported models need it

        config, tensors, tokenizer = load_pretrained(directory)
        model = empty_model(config)
        load_weights(model, tensors, directory)
        return model.to(device).eval(), tokenizer, {"config": {"model": config.model_dump()}}
    state = read_state(directory)
    verify(directory, state, optimizer=False)
    model = empty_model(ModelConfig.model_validate(state["config"]["model"]))
    file = TensorFile(directory / "model.safetensors")
    load_weights(model, ((name, file(name)) for name in sorted(file.names)), file.path)
    return model.to(device).eval(), load_tokenizer(directory), state
