"""How ranks share Muon's work: each block goes to its owner, the update comes back.

With whole copies on every rank (DDP) the owner of a block has its averaged gradient already, and
keeps its momentum alone. Under ZeRO each rank has fragments of gradients and momentum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from gpt_dist.optim.blocks import Block, Fragment, fragments_of, owners_of
from gpt_dist.optim.muon import Muon, part
from gpt_dist.parallel.world import World

Shape = tuple[int, int]
Range = tuple[int, int, int]
"""Block, first element in it, number of elements."""


class Exchange:
    """A ``Share`` of blocks that all ranks of the world hold in fragments. Collective.

    Args:
        world: the ranks.
        dtype: of what travels.
        blocks: the same list on every rank.
        owners: the rank that orthogonalises each block.
        sources: fragments whose direction this rank computes; those of all ranks are the blocks.
        targets: fragments that this rank updates.
    """

    def __init__(
        self,
        world: World,
        dtype: torch.dtype,
        blocks: list[Block],
        owners: list[int],
        sources: list[Fragment],
        targets: list[Fragment],
    ) -> None:
        self.world, self.dtype, self.blocks, self.owners = world, dtype, blocks, owners
        self.shapes = list(dict.fromkeys(block.shape for block in blocks))
        self.sources = {shape: self._ordered(sources, shape) for shape in self.shapes}
        self.targets = {shape: self._ordered(targets, shape) for shape in self.shapes}
        # Who sends this rank what for its blocks, and who wants what of them, by shape.
        self._comes = self._mine(world.gather({s: ranges(f) for s, f in self.sources.items()}))
        self._wanted = self._mine(world.gather({s: ranges(f) for s, f in self.targets.items()}))

    def owned(self, shape: Shape) -> list[int]:
        """The blocks of a shape that this rank orthogonalises."""
        return [
            number
            for number, block in enumerate(self.blocks)
            if block.shape == shape and self.owners[number] == self.world.rank
        ]

    def to_owners(self, shape: Shape, directions: list[Tensor]) -> list[Tensor]:
        sizes = self._sizes(self.sources[shape])
        comes = self._comes[shape]
        arrived = self._swap(directions, sizes, [sum(n for *_, n in r) for r in comes])()
        whole: dict[int, Tensor] = {}
        for number in self.owned(shape):
            block = self.blocks[number]
            whole[number] = arrived.new_empty(block.rows, block.columns)
        at = 0
        for block_number, start, size in (item for rank in comes for item in rank):
            part(whole[block_number], start, size).copy_(arrived[at : at + size])
            at += size
        return list(whole.values())

    def to_holders(self, shape: Shape, updates: list[Tensor]) -> Callable[[], list[Tensor]]:
        whole = dict(zip(self.owned(shape), updates, strict=True))
        wanted, targets = self._wanted[shape], self.targets[shape]
        flat = {number: update.reshape(-1) for number, update in whole.items()}
        pieces = [flat[n][start : start + size] for r in wanted for n, start, size in r]
        sizes = [sum(size for *_, size in rank) for rank in wanted]
        wait = self._swap(pieces, sizes, self._sizes(targets))
        return lambda: list(wait().split([fragment.size for fragment in targets]))

    def _ordered(self, fragments: list[Fragment], shape: Shape) -> list[Fragment]:
        """Those of a shape, by the rank that owns the block: the order in which they travel."""
        chosen = [f for f in fragments if self.blocks[f.block].shape == shape]
        return sorted(chosen, key=lambda f: (self.owners[f.block], f.block, f.start))

    def _mine(self, all_ranks: list[dict[Shape, list[Range]]]) -> dict[Shape, list[list[Range]]]:
        """By shape and rank: the ranges of blocks that this rank owns."""
        me = self.world.rank
        return {
            shape: [[r for r in rank[shape] if self.owners[r[0]] == me] for rank in all_ranks]
            for shape in self.shapes
        }

    def _sizes(self, fragments: list[Fragment]) -> list[int]:
        """Elements of fragments by the rank that owns their block."""
        sizes = [0] * self.world.size
        for fragment in fragments:
            sizes[self.owners[fragment.block]] += fragment.size
        return sizes

    def _swap(
        self, pieces: list[Tensor], sizes: list[int], arriving: list[int]
    ) -> Callable[[], Tensor]:
        """Send flat pieces, ordered by rank; returns a function that waits for what comes."""
        device = self.world.device
        empty = torch.empty(0, dtype=self.dtype, device=device)
        out = torch.cat([empty, *(piece.to(device) for piece in pieces)])
        if self.world.size == 1:
            return lambda: out
        received = out.new_empty(sum(arriving))
        work = dist.all_to_all_single(received, out, arriving, sizes, async_op=True)

        def wait(sent: Tensor = out) -> Tensor:  # which must live until it has arrived
            work.wait()
            return received

        return wait


def ranges(fragments: list[Fragment]) -> list[Range]:
    """What other ranks need to know of fragments."""
    return [(f.block, f.start, f.size) for f in fragments]


def share_copies(muon: Muon, world: World) -> Exchange:
    """Share the matrices of a model that every rank has whole. Collective."""
    owners = owners_of(muon.blocks, world.size)
    targets = [
        fragment
        for number, (name, matrix) in enumerate(muon.matrices.items())
        for fragment in fragments_of(muon.blocks, name, 0, matrix.numel(), number, 0)
    ]
    # The owner of a block keeps its momentum: of each matrix, its own blocks one after the other.
    kept = [0] * len(muon.matrices)
    sources = []
    for fragment in targets:
        if owners[fragment.block] == world.rank:
            sources.append(fragment._replace(kept=kept[fragment.tensor]))
            kept[fragment.tensor] += fragment.size
    exchange = Exchange(world, muon.dtype, muon.blocks, owners, sources, targets)
    tensors = list(muon.matrices.values())
    shapes = [(n // m.shape[1], m.shape[1]) for n, m in zip(kept, tensors, strict=True)]
    muon.share_out(list(tensors), exchange, shapes)
    return exchange


def share_partition(
    muon: Muon, world: World, flat: Tensor, matrices: list[str], held: dict[str, Range]
) -> None:
    """Share matrices of which every rank has a flat partition. Collective.

    Args:
        muon: the optimizer.
        world: the ranks.
        flat: this rank's partition of all of them.
        matrices: whose parts are in the partitions.
        held: matrix → first element of this rank's part within it, number of elements, and where
            they begin in ``flat``.
    """
    blocks = [block for block in muon.blocks if block.matrix in matrices]
    fragments = [
        fragment
        for name, (start, size, at) in held.items()
        for fragment in fragments_of(blocks, name, start, size, 0, at)
    ]
    owners = owners_of(blocks, world.size)
    exchange = Exchange(world, muon.dtype, blocks, owners, fragments, fragments)
    muon.share_out([flat], exchange, [tuple(flat.shape)])
