"""What Muon orthogonalises, and which rank does it.

A block is a matrix, or the queries, keys or values of a fused one. Each has one owner, the rank
that orthogonalises it. The tensors that a rank holds contain blocks whole (DDP) or in fragments
(ZeRO).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

FUSED = "attn.c_attn.weight"
"""Ends the name of a matrix that is three: queries, keys and values."""


class Block(NamedTuple):
    """Consecutive rows of a matrix that are orthogonalised together."""

    matrix: str
    """Name of the parameter."""
    first: int
    """Row of the matrix where the block begins."""
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Its sides, the shorter first: blocks of equal shape are iterated together."""
        return min(self.rows, self.columns), max(self.rows, self.columns)

    @property
    def start(self) -> int:
        """Elements of the matrix before the block."""
        return self.first * self.columns

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    @property
    def flops(self) -> int:
        """FLOPs of one iteration of Newton-Schulz: three matrix products."""
        short, long = self.shape
        return 4 * short * short * long + 2 * short**3


class Fragment(NamedTuple):
    """Consecutive elements of a block, and where a rank holds them."""

    block: int
    """Number of the block."""
    start: int
    """First element within the block."""
    size: int
    """Number of elements."""
    tensor: int
    """Number of the tensor that holds them."""
    at: int
    """First element within that tensor, and within its gradient."""
    kept: int
    """First element within the momentum of that tensor."""


class Share(Protocol):
    """A rank's part in orthogonalising the blocks of some tensors."""

    blocks: list[Block]
    shapes: list[tuple[int, int]]
    """Every shape of a block, once."""
    sources: dict[tuple[int, int], list[Fragment]]
    """By shape: fragments whose direction this rank computes."""
    targets: dict[tuple[int, int], list[Fragment]]
    """By shape: fragments that this rank updates."""

    def to_owners(self, shape: tuple[int, int], directions: list[Tensor]) -> list[Tensor]:
        """The whole blocks that this rank owns, (rows, columns) each. Collective.

        Args:
            shape: of the blocks.
            directions: flat, one for each of ``sources[shape]``.
        """
        ...

    def to_holders(
        self, shape: tuple[int, int], updates: list[Tensor]
    ) -> Callable[[], list[Tensor]]:
        """Send updates on their way. Collective.

        Args:
            shape: of the blocks.
            updates: (rows, columns), one for each block that ``to_owners`` returned.

        Returns:
            A function that waits for those of this rank: flat, one for each of ``targets[shape]``.
        """
        ...


def blocks_of(shapes: Mapping[str, tuple[int, ...]], *, split_qkv: bool) -> list[Block]:
    """The blocks of named matrices, in their order.

    Args:
        shapes: parameter → (rows, columns).
        split_qkv: whether a fused query-key-value matrix is three blocks, not one.
    """
    found = []
    for name, (rows, columns) in shapes.items():
        sizes = [rows]
        if split_qkv and name.endswith(FUSED):  # as many queries as columns; keys may be fewer
            sizes = [columns, (rows - columns) // 2, (rows - columns) // 2]
        for part, size in enumerate(sizes):
            found.append(Block(name, sum(sizes[:part]), size, columns))
    return found


def owners_of(blocks: list[Block], ranks: int) -> list[int]:
    """The rank that owns each block: the costliest blocks first, each to who has least to do.

    Graham 1969, "Bounds on multiprocessing timing anomalies": no rank has more than 4/3 of the
    work of the best division.
    """
    work = [0] * ranks
    owners = [0] * len(blocks)
    for number in sorted(range(len(blocks)), key=lambda n: -blocks[n].flops):
        owner = work.index(min(work))
        owners[number] = owner
        work[owner] += blocks[number].flops
    return owners


def fragments_of(
    blocks: list[Block], matrix: str, start: int, size: int, tensor: int, at: int
) -> list[Fragment]:
    """The fragments in consecutive elements of a matrix.

    Args:
        blocks: all of them.
        matrix: name of the parameter.
        start: first of the elements within it.
        size: number of elements.
        tensor: number of the tensor that holds them.
        at: where they begin in that tensor.
    """
    found = []
    for number, block in enumerate(blocks):
        first, last = max(start, block.start), min(start + size, block.start + block.size)
        if block.matrix == matrix and first < last:
            place = at + first - start
            found.append(Fragment(number, first - block.start, last - first, tensor, place, place))
    return found


def scale(shape: tuple[int, int]) -> float:
    """What makes an orthogonal block's elements as large as those of AdamW's update.

    Moonlight, arXiv:2502.16982, section 2.2.
    """
    return 0.2 * math.sqrt(max(shape))
