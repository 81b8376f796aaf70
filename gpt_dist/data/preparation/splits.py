"""Which text goes to training and which to validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpt_dist.data.preparation.documents import ByteWindow
from gpt_dist.data.preparation.sources import FileInput, text_reader
from gpt_dist.data.shards import Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def split_chooser(val_fraction: float, seed: int) -> Callable[[int], Split]:
    """Which split a document goes to: a hash of its index decides, so that it streams.

    The first document is always for training and, where there is validation at all, the second for
    validation, so that a handful of documents has both.
    """
    threshold = int(val_fraction * 2**64)

    def choose(index: int) -> Split:
        if threshold == 0 or index == 0:
            return "train"
        return "val" if index == 1 or _mix(index + (seed << 32)) < threshold else "train"

    return choose


def _mix(value: int) -> int:
    """SplitMix64 (Steele, Lea and Flood 2014): 64 well-mixed bits of an integer."""
    mask = 2**64 - 1
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def split_by_characters(whole: FileInput, val_fraction: float) -> list[FileInput]:
    """One file as two inputs: the first characters for training, the last for validation.

    As nanoGPT: the first ``int(n * (1 - val_fraction))`` of n characters.

    Raises:
        GptDistError: the file cannot be had or read.
    """
    path = whole.path()
    characters = sum(len(begins) for _, begins in _character_begins(path))
    wanted = int(characters * (1 - val_fraction))
    cut = None
    for position, begins in _character_begins(path):
        if wanted < len(begins):
            cut = position + int(begins[wanted])
            break
        wanted -= len(begins)

    def part(split: Split, start: int, end: int | None) -> FileInput:
        return replace(whole, reader=text_reader("files", start, end), split=split)

    return [part("train", 0, cut), *([part("val", cut, None)] if cut is not None else [])]


def _character_begins(path: Path) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Blocks of a file: their place, and where in them characters begin."""
    import numpy as np

    with closing(ByteWindow(path)) as window:
        while window.grow():
            data = np.frombuffer(window.bytes(len(window)), dtype=np.uint8)
            yield window.position, np.flatnonzero((data & 0xC0) != 0x80)
            window.take(len(window))
