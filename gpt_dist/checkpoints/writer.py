"""Writing checkpoints in the background, while training goes on."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_dist.checkpoints.checkpoint import FORMAT_VERSION, newest_checkpoint, step_name
from gpt_dist.checkpoints.directory import CheckpointDirectory
from gpt_dist.checkpoints.reader import is_vocabulary
from gpt_dist.checkpoints.tensor_files import safetensors_chunks, write_file
from gpt_dist.errors import GptDistError, describe
from gpt_dist.files import file_sha256, sync_directory
from gpt_dist.text.tokenizers import Tokenizer

NICENESS = 10
"""Of the thread that writes a large checkpoint: a ninth of a busy core, or an idle one."""
LARGE = 100_000_000
"""Bytes above which writing a checkpoint takes longer than a step. Smaller ones are written at
normal priority."""


class CheckpointWriter:
    """Writes ``directory``/step-XXXXXXXX in a thread; one checkpoint at a time.

    Args:
        directory: ``OUT_DIR/checkpoints``.
        keep: how many of the newest checkpoints stay beside the best.
        keep_every: checkpoints whose step is a multiple of this stay for good; 0 = none.
    """

    def __init__(self, directory: Path, keep: int, keep_every: int = 0) -> None:
        self._directory = CheckpointDirectory(directory, keep, keep_every)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._recovered = False

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
        """Copy the state to host memory now and write it in the background.

        Waits until the previous checkpoint is written. Call ``busy`` first if that may take long.

        Args:
            tensors: ``Engine.full_state()``; gathering it is collective.
            state: contents of ``state.json``, ``step`` among them.
            tokenizer: saved with the weights.
            vocab_size: rows of vocabulary tensors without padding.
            best: whether ``checkpoints/best`` is to point here.
            write: False on ranks that only take part in gathering.

        Raises:
            GptDistError: the previous checkpoint could not be written.
        """
        self.wait()
        if not write:
            for _ in tensors:
                pass
            return
        snapshot = self._copy(tensors, vocab_size)
        self._thread = threading.Thread(
            target=self._guarded, args=(snapshot, state, tokenizer, best), name="checkpoint"
        )
        self._thread.start()

    def spare(self, step: int | None) -> None:
        """Keep the checkpoint of a step for good."""
        self._directory.spared = step

    def busy(self, patience: float) -> bool:
        """Whether a write is still under way, after waiting up to ``patience`` seconds for it."""
        if self._thread is not None:
            self._thread.join(patience)
            if not self._thread.is_alive():
                self._thread = None
        return self._thread is not None

    def check(self) -> None:
        """Raise what the last write failed with.

        Raises:
            GptDistError: the disk is full, say; earlier checkpoints are as they were.
        """
        if self._error is not None:
            error, self._error = self._error, None
            newest = newest_checkpoint(self._directory.path)
            left = f"the newest complete one is {newest}" if newest else "there is none yet"
            raise GptDistError(f"checkpoint not written: {describe(error)}; {left}") from error

    def wait(self) -> None:
        """Return when no write is under way any more.

        Raises:
            GptDistError: the write failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Wait for the write that is under way, and ignore whether it fails."""
        if self._thread is not None:
            self._thread.join()

    def _copy(self, tensors: Iterator[tuple[str, Tensor]], vocab_size: int) -> dict[str, Tensor]:
        """fp32 copies in host memory, in buffers that every checkpoint uses again."""
        snapshot = {}
        overlapped = False
        for name, tensor in tensors:
            kept = tensor[:vocab_size] if is_vocabulary(name) else tensor
            pinned = kept.device.type == "cuda"
            if name not in self._buffers:
                self._buffers[name] = torch.empty(
                    kept.shape, dtype=torch.float32, pin_memory=pinned
                )
            # Only copies into pinned memory may overlap; what another device (MPS) copies must
            # have arrived before the thread reads it.
            snapshot[name] = self._buffers[name].copy_(kept, non_blocking=pinned)
            overlapped = overlapped or pinned
        if overlapped:
            torch.cuda.synchronize()
        return snapshot

    def _guarded(self, snapshot: dict[str, Tensor], *args: Any) -> None:
        # Only Linux has a niceness for each thread; other systems have one for the process.
        if sys.platform == "linux" and sum(t.nbytes for t in snapshot.values()) > LARGE:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._write(snapshot, *args)
        except BaseException as error:  # the next check() raises it
            self._error = error

    def _write(
        self,
        snapshot: dict[str, Tensor],
        state: dict[str, Any],
        tokenizer: Tokenizer,
        best: bool,
    ) -> None:
        directory, step = self._directory, state["step"]
        if not self._recovered:
            directory.recover()
            self._recovered = True
        with directory.writing(step) as temporary:
            write_checkpoint(temporary, snapshot, state | {"best": best}, tokenizer)
        if best:
            directory.point_best_at(directory.path / step_name(step))
        directory.rotate()


def write_checkpoint(
    directory: Path, tensors: dict[str, Tensor], state: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Write the files of a checkpoint into an existing, empty directory, through to the disk.

    Args:
        directory: where to write; the caller gives it its final name.
        tensors: ``model.<parameter>`` and ``optimizer.<state>.<parameter>``, without padding rows.
        state: contents of ``state.json``, except for the checksums.
        tokenizer: saved with them.

    Raises:
        OSError: with the name of the file that cannot be written.
    """
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
