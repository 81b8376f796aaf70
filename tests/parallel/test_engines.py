"""Engines on two ranks, call by call."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_dist.config.command_line import build, load
from gpt_dist.config.settings import Config
from gpt_dist.data.loader import Batch
from gpt_dist.evaluation.scoring import Request, score
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.compiling import compile_blocks, warm_up
from gpt_dist.parallel.world import World
from gpt_dist.training.setup import make_engine, setup
from tests.parallel.ranks import on_ranks
from tests.parallel.test_compiling import Counter
from tests.parallel.test_zero import SETTINGS

STRATEGIES = ("ddp", "zero-0", "zero-1", "zero-2", "zero-3")


def settings(strategy: str, **train: Any) -> Config:
    name, _, stage = strategy.partition("-")
    parallel: dict[str, Any] = {"strategy": name}
    if stage:
        parallel = {
            "strategy": "deepspeed",
            "zero_stage": int(stage),
            "deepspeed_config": str(SETTINGS),
        }
    return build(
        {
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 24,
                      "vocab_size": 11},
            "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 0},
            "train": {"batch_tokens": 384, "micro_batch_size": 4, "compile": False, **train},
            "parallel": parallel,
        }
    )  # fmt: skip


def batches(count: int, rank: int) -> list[Batch]:
    torch.manual_seed(rank)
    return [
        Batch(torch.randint(0, 11, (4, 24)), torch.randint(0, 11, (4, 24))) for _ in range(count)
    ]


def warm_up_often(world: World) -> None:
    for strategy in STRATEGIES:
        warm_up_twice(world, strategy)


def warm_up_twice(world: World, strategy: str) -> None:
    config = settings(strategy)
    losses = []
    for passes in (0, 2):
        torch.manual_seed(0)
        model = GPT(config.model).train()
        engine = make_engine(model, world, config, torch.float32)
        before = {name: value.clone() for name, value in engine.full_state()}
        data = batches(4, world.rank)
        generator = torch.get_rng_state()
        for _ in range(passes):
            warm_up(engine, world, config, data[0])
        assert torch.equal(torch.get_rng_state(), generator)
        for name, value in engine.full_state():
            assert torch.equal(value, before[name]), name
        found = []
        for pair in (data[:2], data[2:]):
            loss = engine.micro_step(pair[0], last=False) + engine.micro_step(pair[1], last=True)
            found += [float(loss), float(engine.step(1e-2))]
        losses.append(found)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


@pytest.mark.slow(25)
def test_warming_up_changes_nothing() -> None:
    """Under every strategy, however often."""
    on_ranks(warm_up_often)


def compile_and_step(world: World) -> None:
    original = torch.compile
    for strategy in STRATEGIES[:-1]:
        torch.compiler.reset()
        counter = Counter()
        torch.compile = functools.partial(original, backend=counter.backend)
        step_compiled(world, strategy, counter)


def step_compiled(world: World, strategy: str, counter: Counter) -> None:
    config = settings(strategy, compile=True)
    torch.manual_seed(0)
    model = GPT(config.model).train()
    assert compile_blocks(model, world, config, torch.float32) == "compiled"
    graphs = len(counter.forward), len(counter.backward)
    engine = make_engine(model, world, config, torch.float32)
    data = batches(4, world.rank)
    warm_up(engine, world, config, data[0])
    for pair in (data[:2], data[2:]):
        engine.micro_step(pair[0], last=False)
        engine.micro_step(pair[1], last=True)
        engine.step(1e-2)
        model.eval()
        engine.evaluate(pair[0])
        model.train()
        score(model, [Request([1] * 3, [2, 3]), Request([4], [5])], batch_size=3, world=world)
    assert graphs == (2, 1), strategy
    assert (len(counter.forward), len(counter.backward)) == graphs, strategy


@pytest.mark.slow
def test_engines_step_with_the_graphs_that_were_tried() -> None:
    on_ranks(compile_and_step)


def fail_on_one_rank(world: World) -> tuple[str, bool]:
    config = settings("ddp", compile="auto")
    counter = Counter(fail="backward" if world.rank else "")
    torch.compile = functools.partial(torch.compile, backend=counter.backend)
    from gpt_dist.parallel import compiling

    compiling.AUTOMATIC = ("cpu",)
    model = GPT(config.model).train()
    said = compile_blocks(model, world, config, torch.float32)
    return said, any("forward" in vars(block) for block in model.h)


@pytest.mark.slow
def test_all_ranks_go_on_without_compiling_where_one_cannot() -> None:
    first, second = on_ranks(fail_on_one_rank)
    assert first == second
    assert first[0].startswith("eager (torch.compile failed: rank 1 on ")
    assert "no such instruction" in first[0]
    assert not first[1]


def partition(world: World, config_file: str) -> list[tuple[int, int, int]]:
    """Set a ZeRO-3 run up; each parameter's elements here, of it in all, and of its partition."""
    import deepspeed

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the whole model moves at once")

    initialize = deepspeed.initialize

    def check(model: GPT, **kwargs: Any) -> Any:
        assert all(p.numel() == 0 for p in model.parameters())
        return initialize(model=model, **kwargs)

    deepspeed.initialize = check
    shared_memory = importlib.import_module("deepspeed.comm.torch").build_shm_op
    GPT.to = GPT.cuda = GPT.cpu = fail  # type: ignore[method-assign]
    run = setup(load(["--config", config_file])[0], world)
    # Nothing is compiled for communication on a CPU.
    assert importlib.import_module("deepspeed.comm.torch").build_shm_op is not shared_memory
    try:
        return [
            (p.numel(), p.ds_numel, p.ds_tensor.numel())  # type: ignore[attr-defined]
            for p in run.engine.model.parameters()
        ]
    finally:
        run.close()


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model_under_zero_3(tiny_config: Any, tmp_path: Path) -> None:
    parallel = {"strategy": "deepspeed", "zero_stage": 3, "deepspeed_config": str(SETTINGS)}
    file = tiny_config(parallel=parallel)
    first, second = on_ranks(partition, str(file))
    assert first == second
    for here, whole, part in first:
        assert here == 0
        assert whole <= 2 * part <= whole + 1
