"""Compiling is over before the first step, and where it fails the run goes on without it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpt_dist.config.command_line import build
from gpt_dist.config.settings import Config
from gpt_dist.data.loader import Batch
from gpt_dist.errors import GptDistError
from gpt_dist.evaluation.scoring import Request, score
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate_many
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel import compiling
from gpt_dist.parallel.compiling import compile_blocks, warm_up
from gpt_dist.parallel.ddp import DDPEngine
from gpt_dist.parallel.world import World

WORLD = World(0, 1, 0, 1, torch.device("cpu"))
Graph = torch.fx.GraphModule


def settings(**sections: dict[str, Any]) -> Config:
    return build(
        {
            "model": {"n_layer": 3, "n_head": 2, "n_embd": 16, "context_length": 24,
                      "vocab_size": 11, **sections.pop("model", {})},
            "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 0},
            "train": {"batch_tokens": 192, "micro_batch_size": 4, "compile": True,
                      **sections.pop("train", {})},
            **sections,
        }
    )  # fmt: skip


def make(config: Config) -> GPT:
    torch.manual_seed(0)
    return GPT(config.model)


def batches(count: int) -> list[Batch]:
    torch.manual_seed(1)
    return [
        Batch(torch.randint(0, 11, (4, 24)), torch.randint(0, 11, (4, 24))) for _ in range(count)
    ]


class Counter:
    """A backend that compiles nothing, and keeps the input shapes of each graph."""

    def __init__(self, fail: str = "", error: Exception | None = None) -> None:
        from torch._dynamo.backends.common import aot_autograd  # seconds

        self.forward: list[list[Any]] = []
        self.backward: list[list[Any]] = []
        self.fail, self.error = fail, error or ValueError("no such instruction\nand more")
        self.backend = aot_autograd(
            fw_compiler=functools.partial(self._compile, "forward"),
            bw_compiler=functools.partial(self._compile, "backward"),
        )

    def _compile(self, kind: str, graph: Graph, inputs: list[Any]) -> Callable[..., Any]:
        if kind == self.fail:
            raise self.error
        getattr(self, kind).append([getattr(value, "shape", value) for value in inputs])
        return graph.forward


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Counter], Counter]:
    """Let ``torch.compile`` use a backend."""

    def apply(counter: Counter) -> Counter:
        torch.compiler.reset()
        original = functools.partial(torch.compile, backend=counter.backend)
        monkeypatch.setattr(compiling.torch, "compile", original)
        return counter

    return apply


@pytest.mark.slow(2)
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_every_graph_is_there_before_the_first_step(
    use: Callable[[Counter], Counter], blocks: bool
) -> None:
    """One graph for training and one for validation, with constant shapes.

    With activation checkpointing they are a block's, and serve all blocks. No training step,
    validation, scoring or sampling makes another.
    """
    counter, config = use(Counter()), settings(model={"activation_checkpointing": blocks})
    model, data = make(config), batches(6)
    generator = torch.get_rng_state()
    assert compile_blocks(model, WORLD, config, torch.float32) == "compiled"
    engine = DDPEngine(model, WORLD, config, torch.float32)
    warm_up(engine, WORLD, config, data[0])
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    found = len(counter.forward), len(counter.backward)
    assert found == (2, 1)
    for shapes in (*counter.forward, *counter.backward):
        assert not any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)
        assert any(tuple(shape) == (4, 24, 16) for shape in shapes)

    plain = settings(train={"compile": False})
    eager = DDPEngine(make(plain), WORLD, plain, torch.float32)
    for each in (engine, eager):
        each.model.eval()
        each.evaluate(data[0])
        each.model.train()
        score(each.model, [Request([1] * 3, [2, 3]), Request([4], [5])], batch_size=3)
        decoder = Decoder(each.model, max_slots=2)
        for _ in generate_many(decoder, [[1, 2], [3]], [SamplingParams()] * 2, 5):
            pass
    for pair in (data[:2], data[2:4], data[4:]):
        losses = []
        for each in (engine, eager):
            total = each.micro_step(pair[0], last=False) + each.micro_step(pair[1], last=True)
            losses.append((float(total), float(each.step(1e-2))))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (len(counter.forward), len(counter.backward)) == found
    assert set(model.state_dict()) == set(eager.model.state_dict())


@pytest.mark.slow(2)
def test_other_shapes_are_not_compiled(use: Callable[[Counter], Counter]) -> None:
    counter, config = use(Counter()), settings()
    model = make(config)
    compile_blocks(model, WORLD, config, torch.float32)
    found = len(counter.forward)
    requests = [Request([1] * n, [2, 3]) for n in range(1, 9)]
    compiled = score(model, requests, batch_size=3)
    assert len(counter.forward) == found
    torch.testing.assert_close(compiled, score(make(config), requests, batch_size=3))
    with torch.no_grad():
        model(batches(1)[0].ids)
    assert "trunk" in vars(model)  # and the graph is there again


@pytest.mark.slow(2)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("setting", ["auto", True])
def test_a_compiler_that_fails(
    use: Callable[[Counter], Counter], monkeypatch: pytest.MonkeyPatch, where: str, setting: Any
) -> None:
    use(Counter(fail=where))
    config = settings(train={"compile": setting})
    model = make(config)
    before = copy.deepcopy(model.state_dict())
    cuda = World(0, 1, 0, 1, torch.device("cpu"))
    monkeypatch.setattr(compiling, "AUTOMATIC", ("cpu",))
    if setting is True:
        with pytest.raises(GptDistError) as raised:
            compile_blocks(model, cuda, config, torch.float32)
        text = str(raised.value)
        assert text.startswith("train.compile = true: ")
        assert "no such instruction" in text
        assert "\n" not in text
        return
    done = compile_blocks(model, cuda, config, torch.float32)
    assert done.startswith("eager (torch.compile failed: ")
    assert "no such instruction" in done
    assert "\n" not in done
    assert model.training
    assert "trunk" not in vars(model)
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    engine = DDPEngine(model, WORLD, config, torch.float32)
    engine.micro_step(batches(1)[0], last=True)
    assert float(engine.step(1e-2)) > 0


def test_what_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = settings(train={"compile": "auto"})
    assert compile_blocks(make(auto), WORLD, auto, torch.float32) == "eager"
    never = settings(train={"compile": False})
    assert compile_blocks(make(never), WORLD, never, torch.float32) == "eager"
    monkeypatch.setattr(compiling, "AUTOMATIC", ("cpu",))
    sharded = settings(
        train={"compile": "auto"}, parallel={"strategy": "deepspeed", "zero_stage": 3}
    )
    done = compile_blocks(make(sharded), WORLD, sharded, torch.float32)
    assert done == "eager (ZeRO-3 gathers weights between the operations that would be fused)"


@pytest.mark.slow(2)
def test_ddp_does_not_split_blocks(use: Callable[[Counter], Counter]) -> None:
    use(Counter())
    config = settings()
    torch._dynamo.config.optimize_ddp = True
    compile_blocks(make(config), WORLD, config, torch.float32)
    assert torch._dynamo.config.optimize_ddp is False


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS out of memory")]
)
def test_too_little_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(train={"compile": False})
    engine = DDPEngine(make(config), WORLD, config, torch.float32)

    def fail(batch: Batch) -> None:
        raise error

    monkeypatch.setattr(engine, "warm_up", fail)
    with pytest.raises(GptDistError, match=r"micro-batch of 4 sequences does not fit.*micro_batch"):
        warm_up(engine, WORLD, config, batches(1)[0])


@pytest.mark.slow(60)
def test_compiled_and_eager_losses_agree() -> None:
    """With the real compiler."""
    torch.compiler.reset()
    config = settings()
    engines = []
    for compiled in (True, False):
        model = make(config)
        if compiled:
            assert compile_blocks(model, WORLD, config, torch.float32) == "compiled"
        engines.append(DDPEngine(model, WORLD, config, torch.float32))
    for batch in batches(5):
        losses = [float(engine.micro_step(batch, last=True)) for engine in engines]
        norms = [float(engine.step(1e-2)) for engine in engines]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
