"""The optimizer and its state where every rank has a whole copy of the weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from gpt_dist.config.settings import OptimConfig
from gpt_dist.model.gpt import GPT
from gpt_dist.optim.adamw import AdamW, can_fuse
from gpt_dist.optim.average import advance_average, begin_average
from gpt_dist.optim.muon import Muon
from gpt_dist.parallel.engine import Reader
from gpt_dist.parallel.sharing import Exchange, share_copies
from gpt_dist.parallel.world import World


def make_optimizer(model: GPT, config: OptimConfig, device: torch.device) -> AdamW:
    """The optimizer that ``optim.name`` names, still without state.

    Args:
        model: whose parameters to optimize, whole.
        config: the run's.
        device: where the optimizer steps.
    """
    kind = Muon if config.name == "muon" else AdamW
    return kind(model, config, fused=can_fuse(device))


class CopiedState:
    """State of the optimizer of a model that every rank has whole. All methods are collective.

    Moments are on every rank; Muon's momentum of a block is on the rank that owns the block.
    The state is made at once: tensors that live as long as the run do not fragment the heap.
    """

    def __init__(self, model: GPT, optimizer: AdamW, world: World) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.averages = False
        self.exchange: Exchange | None = None
        for group in optimizer.param_groups:
            if not group["muon"]:
                optimizer.make_state(group["params"])
            elif isinstance(optimizer, Muon):
                self.exchange = share_copies(optimizer, world)

    def begin_average(self) -> None:
        """Begin an average of the weights."""
        begin_average(self.optimizer, list(self.model.parameters()))
        self.averages = True

    def average(self, decay: float | None) -> None:
        """Advance the average after a step, if there is a decay; the first time it begins."""
        if decay is None:
            return
        if not self.averages:
            self.begin_average()
        advance_average(self.optimizer, list(self.model.parameters()), decay)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of model and optimizer, as ``Engine.full_state`` yields them."""
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter.detach()
        step = torch.zeros(())
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                if key == "step":
                    step = value
                elif key == "momentum_buffer":
                    yield f"optimizer.{key}.{name}", self._whole(name, parameter, value)
                else:
                    yield f"optimizer.{key}.{name}", value
        yield "optimizer.step", step

    @torch.no_grad()
    def load(self, reader: Reader) -> None:
        """Set every tensor of the optimizer."""
        step = reader("optimizer.step")
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                if key == "momentum_buffer":
                    whole = reader(f"optimizer.{key}.{name}")
                    for rows, kept in self._own_rows(name, value):
                        kept.copy_(whole[rows])
                else:
                    value.copy_(step if key == "step" else reader(f"optimizer.{key}.{name}"))

    def _whole(self, name: str, matrix: Tensor, kept: Tensor) -> Tensor:
        """A matrix's momentum, from the ranks that keep its blocks."""
        if self.exchange is None or self.world.size == 1:
            return kept
        whole = torch.empty_like(matrix)
        for rows, own in self._own_rows(name, kept):
            whole[rows] = own
        for block, owner in zip(self.exchange.blocks, self.exchange.owners, strict=True):
            if block.matrix == name:
                dist.broadcast(whole[block.first : block.first + block.rows], owner)
        return whole

    def _own_rows(self, name: str, kept: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a matrix that are a block of this rank, and their momentum."""
        assert self.exchange is not None
        at = 0
        for block, owner in zip(self.exchange.blocks, self.exchange.owners, strict=True):
            if block.matrix == name and owner == self.world.rank:
                yield slice(block.first, block.first + block.rows), kept[at : at + block.rows]
                at += block.rows
