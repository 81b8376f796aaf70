"""Muon's result does not depend on how ranks share it: copies (DDP) or partitions (ZeRO)."""

from __future__ import annotations

import math
import os
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from gpt_dist.config.command_line import build
from gpt_dist.config.settings import Config
from gpt_dist.data.loader import Batch
from gpt_dist.model.gpt import GPT
from gpt_dist.optim import muon
from gpt_dist.optim.blocks import Block, blocks_of, owners_of
from gpt_dist.parallel.engine import Engine
from gpt_dist.parallel.world import World
from gpt_dist.training.setup import make_engine
from tests.parallel.ranks import on_ranks
from tests.parallel.test_zero import SETTINGS

State = dict[str, Tensor]

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SEQUENCES, CONTEXT = 32, 8
BLOCKS = 6
"""Of a layer: queries, keys, values, a projection, and two matrices of the MLP."""


def settings(
    strategy: str,
    micro_batch: int = 4,
    n_embd: int = 24,
    batch_tokens: int = SEQUENCES * CONTEXT,
    **optim: Any,
) -> Config:
    """``ddp``, ``zero-STAGE`` or ``offload-STAGE``."""
    name, _, stage = strategy.partition("-")
    parallel: dict[str, Any] = {"strategy": "ddp"}
    if stage:
        parallel = {
            "strategy": "deepspeed",
            "zero_stage": int(stage),
            "deepspeed_config": str(SETTINGS),
            "offload": name == "offload",
        }
    return build(
        {
            "model": {"n_layer": 1, "n_head": 2, "n_embd": n_embd, "context_length": CONTEXT,
                      "vocab_size": 11},
            "optim": {"name": "muon", "warmup_steps": 0, "newton_schulz_precision": "fp32",
                      **optim},
            "train": {"batch_tokens": batch_tokens, "micro_batch_size": micro_batch},
            "parallel": parallel,
        }
    )  # fmt: skip


def start(world: World, config: Config, state: State | None = None) -> Engine:
    """A new engine, or one that continues from another's state."""
    torch.manual_seed(0)
    model = GPT(config.model).train()
    if state:
        model.load_state_dict(
            {name: state[f"model.{name}"] for name, _ in model.named_parameters()}
        )
    engine = make_engine(model, world, config, torch.float32)
    if state:
        if "optimizer.average.wte.weight" in state:
            engine.begin_average()
        engine.load_optimizer(lambda name: state[name])
    return engine


def steps(engine: Engine, world: World, config: Config, first: int, last: int) -> list[float]:
    """Train steps ``first`` to ``last`` - 1; loss and gradient norm of each."""
    size, count = config.micro_batch(world.size)
    rows = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        # Text with something to learn: each token is followed by its double.
        ids = torch.randint(0, 11, (SEQUENCES, 1), generator=generator)
        ids = torch.cat([ids * 2**n % 11 for n in range(CONTEXT + 1)], dim=1)
        loss = torch.zeros(())
        for micro in range(count):
            at = (micro * world.size + world.rank) * size
            batch = Batch(ids[at : at + size, :-1], ids[at : at + size, 1:])
            loss += engine.micro_step(batch, last=micro == count - 1)
        world.all_reduce(loss)
        norm = engine.step(3e-3, 0.95 if step > 4 else 0.9, 0.8 if step else None, loss)
        rows += [float(loss) / config.train.batch_tokens, float(norm)]
    return rows


def saved(engine: Engine) -> State:
    return {name: tensor.detach().clone() for name, tensor in engine.full_state()}


def alone(first: int, last: int, state: State | None = None) -> tuple[list[float], State]:
    """One process, all sequences at once."""
    config = settings("ddp", SEQUENCES)
    engine = start(ALONE, config, state)
    return steps(engine, ALONE, config, first, last), saved(engine)


def differ(expected: list[float], found: list[float]) -> float:
    """Largest relative difference."""
    assert len(expected) == len(found)
    return max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))


def follow(world: World, strategy: str, micro_batch: int, count: int) -> tuple[list[float], int]:
    """Losses and norms of some steps, and how many blocks this rank orthogonalised in them."""
    config = settings(strategy, micro_batch)
    engine = start(world, config)
    original, blocks = muon.orthogonalize, []

    def counted(matrices: list[Tensor], *rest: Any) -> list[Tensor]:
        blocks.extend(matrices)
        return original(matrices, *rest)

    with mock.patch.object(muon, "orthogonalize", counted):
        rows = steps(engine, world, config, 0, count)
    return rows, len(blocks)


def interrupted(world: World, strategy: str) -> bool:
    """Whether a run that is stopped and continued is bitwise the one that is not."""
    config = settings(strategy, 4, newton_schulz_precision="bf16")
    quiet = start(world, config)
    steps(quiet, world, config, 0, 2)
    again = start(world, config, saved(quiet))
    rows = [steps(engine, world, config, 2, 3) for engine in (quiet, again)]
    expected, found = saved(quiet), saved(again)
    same = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return same and rows[0] == rows[1]


def spike(world: World, strategy: str) -> list[bool]:
    """Whether a step that is an outlier, and the next one that is not, leave the state alone."""
    config = settings(strategy, 4, skip_norm_z=6.0)
    engine = start(world, config)
    steps(engine, world, config, 0, 1)
    same = []
    assert engine.spikes is not None
    for usual in (1e-3, 1e3):
        before = saved(engine)
        engine.spikes.values.copy_(torch.linspace(0, usual, 256).view(2, 128))
        steps(engine, world, config, 1, 2)
        after = saved(engine)
        names = [n for n in before if "average" not in n and "spikes" not in n]
        same.append(all(torch.equal(before[name], after[name]) for name in names))
    return same


def work(world: World, state: dict[str, Any], first: int) -> dict[str, Any]:
    """All that one set of ranks is to show; DeepSpeed takes seconds to import."""
    strategies = STRATEGIES[world.size]
    per_rank = SEQUENCES // world.size
    found = {
        "follow": {
            (name, accumulation): follow(world, name, per_rank // accumulation, count)
            for accumulation, (count, names) in COUNTS[world.size].items()
            for name in names
        },
        "spike": {name: spike(world, name) for name in SPIKY if world.size == 2},
        "same": {name: interrupted(world, name) for name in STOPPED if world.size == 2},
        "relay": [],
    }
    carried = {name: torch.from_numpy(value) for name, value in state.items()}
    for number, strategy in enumerate(strategies):
        config = settings(strategy, 4)
        engine = start(world, config, carried)
        found["relay"] += steps(engine, world, config, first + number, first + number + 1)
        carried = saved(engine)
    return found | {"state": {name: tensor.numpy() for name, tensor in carried.items()}}


STRATEGIES = {
    2: ["ddp", "zero-0", "zero-1", "zero-2", "zero-3", "offload-2", "offload-3"],
    4: ["ddp", "zero-1", "zero-2", "zero-3"],
}
"""By number of ranks; in this order one continues what the one before it saved."""

FOUR = ["ddp", "zero-1", "zero-2", "zero-3"]
STOPPED = ["ddp", "zero-1", "zero-3", "offload-2"]
SPIKY = ["ddp", "zero-0", "zero-1", "zero-3"]
COUNTS = {
    2: {
        1: (20, FOUR),
        2: (2, ["zero-0", "offload-2", "offload-3"]),
        8: (3, ["ddp", "zero-1", "zero-3"]),
    },
    4: {1: (20, FOUR)},
}
"""By number of ranks: by micro-batches in a step, number of steps and strategies."""


def compute() -> dict[int, list[dict[str, Any]]]:
    """By number of ranks: what each rank found."""
    _, state = alone(0, 2)
    found, first = {}, 2
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    for size, strategies in STRATEGIES.items():
        found[size] = on_ranks(work, arrays, first, size=size)
        arrays, first = found[size][0]["state"], first + len(strategies)
    return found


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What `compute` returns. One of pytest's workers computes it for all, as it takes a minute."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / "muon.pickle"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_bytes(pickle.dumps(compute()))
    found: dict[int, list[dict[str, Any]]] = pickle.loads(file.read_bytes())
    return found


@pytest.mark.slow(40)
@pytest.mark.parametrize("size", STRATEGIES)
def test_every_strategy_follows_one_process(
    shown: dict[int, list[dict[str, Any]]], size: int
) -> None:
    """However gradients are cut; and each block is orthogonalised once a step, by one rank."""
    expected, _ = alone(0, 20)
    assert expected[-2] < 0.8 * expected[0]  # it learns
    for accumulation, (count, names) in COUNTS[size].items():
        for name in names:
            ranks = [found["follow"][name, accumulation] for found in shown[size]]
            for rows, _ in ranks:
                assert differ(expected[: 2 * count], rows) < 1e-5, (name, accumulation)
            blocks = [number for _, number in ranks]
            assert sum(blocks) == count * BLOCKS, (name, accumulation)
            assert all(blocks), (name, accumulation)


@pytest.mark.slow
def test_a_run_is_handed_from_engine_to_engine(shown: dict[int, list[dict[str, Any]]]) -> None:
    """From one process to two ranks, to four and back, with another strategy at each step."""
    total = 2 + sum(map(len, STRATEGIES.values()))
    expected, whole = alone(0, total + 1)
    rows, begun = alone(0, 2)
    for found in shown.values():
        rows += found[0]["relay"]
        for other in found:
            assert other["state"].keys() == whole.keys() == begun.keys()
            for name, tensor in whole.items():
                assert other["state"][name].shape == tensor.shape, name
                assert (other["state"][name] == found[0]["state"][name]).all(), name
    assert "optimizer.average.h.0.attn.c_attn.weight" in whole
    state = {name: torch.from_numpy(v) for name, v in shown[4][0]["state"].items()}
    last, state = alone(total, total + 1, state)
    assert differ(expected, rows + last) < 1e-5
    for name, tensor in whole.items():
        if ".average." in name:
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_was_stopped_continues_bitwise(shown: dict[int, list[dict[str, Any]]]) -> None:
    for found in shown[2]:
        assert found["same"] == dict.fromkeys(STOPPED, True)


@pytest.mark.slow
def test_an_outlier_is_skipped_under_every_strategy(
    shown: dict[int, list[dict[str, Any]]],
) -> None:
    for found in shown[2]:
        assert found["spike"] == {name: [True, False] for name in SPIKY}


def load_on_three(world: World) -> list[str]:
    """Names of what is not as it was loaded."""
    config = settings("zero-3", n_embd=20, batch_tokens=24 * CONTEXT)
    engine = start(world, config)
    state = saved(engine)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state.items():
        if name.startswith("optimizer.") and tensor.dim():
            state[name] = torch.randn(tensor.shape, generator=generator)
    engine.load_optimizer(lambda name: state[name])
    found = saved(engine)
    return [name for name, tensor in state.items() if not torch.equal(found[name], tensor)]


@pytest.mark.slow(5)
def test_ranks_need_not_divide_the_size_of_a_parameter() -> None:
    assert on_ranks(load_on_three, size=3) == [[], [], []]


def test_blocks_are_shared_evenly() -> None:
    """At 124M: momentum and work of every rank within an eighth of the mean, up to 16 ranks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(12):
        shapes[f"h.{layer}.attn.c_attn.weight"] = (2304, 768)
        shapes[f"h.{layer}.attn.c_proj.weight"] = (768, 768)
        shapes[f"h.{layer}.mlp.c_fc.weight"] = (3072, 768)
        shapes[f"h.{layer}.mlp.c_proj.weight"] = (768, 3072)
    blocks = blocks_of(shapes, split_qkv=True)
    assert len(blocks) == 12 * 6
    assert blocks[:2] == [
        Block("h.0.attn.c_attn.weight", 0, 768, 768),
        Block("h.0.attn.c_attn.weight", 768, 768, 768),
    ]
    assert len(blocks_of(shapes, split_qkv=False)) == 12 * 4
    fewer = {"h.0.attn.c_attn.weight": (768 + 2 * 192, 768)}  # heads of keys and values
    found = blocks_of(fewer, split_qkv=True)
    assert [(block.first, block.rows) for block in found] == [(0, 768), (768, 192), (960, 192)]
    for ranks in (1, 2, 3, 4, 8, 16):
        owners = owners_of(blocks, ranks)
        for weight in ("flops", "size"):
            shares = [0] * ranks
            for block, owner in zip(blocks, owners, strict=True):
                shares[owner] += getattr(block, weight)
            assert max(shares) <= 1.12 * sum(shares) / ranks, (ranks, weight)
    assert owners_of(blocks[:1], 4) == [0]
    assert math.isclose(blocks[0].flops, 6 * 768**3)
