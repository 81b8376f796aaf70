"""The entries of ``OUT_DIR/checkpoints``: adding, replacing and removing checkpoints, and ``best``.

The process may be killed between any two operations here. Readers then still find a complete
checkpoint of every step that had one and was not to be removed, and ``recover`` cleans up.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpt_dist.checkpoints.checkpoint import (
    DAMAGED,
    REPLACED,
    DamagedError,
    candidates,
    complete_checkpoints,
    read_state,
    step_name,
    step_of,
)
from gpt_dist.files import sync_directory


class CheckpointDirectory:
    """``OUT_DIR/checkpoints``, as the one process that writes there uses it.

    Args:
        path: the directory; ``recover`` makes it.
        keep: how many of the newest checkpoints stay beside the best.
        keep_every: checkpoints whose step is a multiple of this stay for good; 0 = none.
    """

    def __init__(self, path: Path, keep: int, keep_every: int = 0) -> None:
        self.path, self.keep, self.keep_every = path, keep, keep_every
        self.spared: int | None = None
        """A step whose checkpoint stays for good too."""

    def recover(self) -> None:
        """Finish or remove what a killed process left incomplete.

        Raises:
            OSError: the directory cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for pattern in (".writing-*", ".removing-*"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path)
        for path in self.path.glob(f"step-*{REPLACED}"):
            self._end_replacing(path.with_name(path.name.removesuffix(REPLACED)))
        (self.path / ".best").unlink(missing_ok=True)
        self._find_best()

    def set_aside(self, damaged: Iterable[Path]) -> None:
        """Rename damaged checkpoints, so that the earlier ones are the newest.

        They keep all their files. Nothing reads or removes them afterwards.

        Raises:
            OSError: a directory cannot be renamed.
        """
        damaged = list(damaged)
        if not damaged:
            return
        self._find_best(damaged)  # first, so that the link always leads somewhere
        for path in damaged:
            path.rename(aside(path))
        sync_directory(self.path)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """An empty directory to fill; when the block ends well, it is the checkpoint of ``step``.

        Raises:
            OSError: a directory cannot be made or renamed; an older checkpoint of this step is as
                it was.
        """
        final = self.path / step_name(step)
        temporary = self.path / f".writing-{final.name}"
        temporary.mkdir()
        try:
            yield temporary
            if final.exists():  # this step was saved before, by a run that was stopped there
                final.rename(final.with_name(final.name + REPLACED))
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            self._end_replacing(final)
            raise
        sync_directory(self.path)
        self._end_replacing(final)

    def point_best_at(self, checkpoint: Path) -> None:
        """Let the link ``best`` point to a checkpoint here."""
        link = self.path / ".best"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        link.rename(self.path / "best")
        sync_directory(self.path)

    def rotate(self) -> None:
        """Remove the checkpoints that are not to be kept."""
        best = self.path / "best"
        spared = best.resolve() if best.is_symlink() else None
        for old in complete_checkpoints(self.path)[: -self.keep]:
            step = step_of(old)
            forever = step == self.spared or (self.keep_every and step % self.keep_every == 0)
            if not forever and old.resolve() != spared:
                self._remove(old)

    def _find_best(self, leaving_out: Collection[Path] = ()) -> None:
        """Let ``best`` point to the best of the checkpoints; remove the link if none was the best.

        Args:
            leaving_out: checkpoints that are about to be renamed.
        """
        staying = [path for path in candidates(self.path) if path not in leaving_out]
        # Losses fall from one best checkpoint to the next, so the newest that was one is the best.
        for path in staying:
            with suppress(DamagedError):  # of an older checkpoint, which the run does not need
                if read_state(path).get("best"):
                    if (self.path / "best").resolve() != path.resolve():
                        self.point_best_at(path)
                    return
        best = self.path / "best"
        if best.is_symlink() and best.resolve() not in [path.resolve() for path in staying]:
            best.unlink()

    def _end_replacing(self, final: Path) -> None:
        """Keep one of two checkpoints of the same step: the new one if it is complete."""
        replaced = final.with_name(final.name + REPLACED)
        if not replaced.exists():
            return
        if final.exists():
            self._remove(replaced)
        else:
            replaced.rename(final)

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(f".removing-{path.name}")
        path.rename(doomed)
        sync_directory(self.path)
        shutil.rmtree(doomed)


def aside(checkpoint: Path) -> Path:
    """A free name for a damaged checkpoint: ``step-00000100.damaged``, ``….damaged-2``, …"""
    plain = checkpoint.with_name(step_name(step_of(checkpoint)) + DAMAGED)
    names = (plain.with_name(f"{plain.name}-{count}") for count in itertools.count(2))
    return next(path for path in itertools.chain([plain], names) if not path.exists())
