"""On CUDA no update and no validation makes the host wait: a fake device reads nothing back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from gpt_dist.config.command_line import build
from gpt_dist.data.loader import Batch
from gpt_dist.evaluation import validation
from gpt_dist.model.empty import empty_model
from gpt_dist.parallel.ddp import DDPEngine
from gpt_dist.parallel.world import World
from tests.gpu.fake import Watch, fake_cuda


def settings(**optim: Any) -> Any:
    return build(
        {
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 16,
                      "vocab_size": 60},
            "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 0, **optim},
            "train": {"batch_tokens": 64, "micro_batch_size": 4},
        }
    )  # fmt: skip


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Any:
    """An engine on the fake device; its parameters have gradients."""
    with fake_cuda() as device:
        config = settings(**request.param)
        model = empty_model(config.model).requires_grad_(False)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                moved = torch.nn.Parameter(parameter.to(device), requires_grad=False)
                setattr(module, name, moved)
        engine = DDPEngine(model, World(0, 1, 0, 1, device), config, torch.bfloat16)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        yield engine, config, device


@pytest.mark.parametrize(
    "engine",
    [{}, {"skip_loss_z": 3.0}, {"name": "muon"}, {"name": "muon", "skip_norm_z": 3.0}],
    ids=["adamw", "adamw, spikes", "muon", "muon, spikes"],
    indirect=True,
)
def test_an_update(engine: Any) -> None:
    stepped, _, device = engine
    with Watch() as watch:
        norm = stepped.step(1e-2, 0.95, 0.999, torch.zeros((), device=device))
    assert norm.device.type == "cuda"
    assert watch.launches["_local_scalar_dense"] == 0
    # Beside them nothing would be proved: reading a value of this device fails.
    with pytest.raises(DataDependentOutputException):
        norm.item()


@pytest.mark.parametrize("engine", [{}], indirect=True)
def test_a_validation(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches are evaluated one after the other; only the sum at the end is read."""
    stepped, config, device = engine
    stepped.model.eval()
    stepped.evaluate(Batch(*torch.zeros(2, 4, 16, dtype=torch.int64, device=device)))
    done: list[int] = []

    def batches(*_: Any, **__: Any) -> Any:
        for number in range(3):
            done.append(number)
            yield Batch(*torch.zeros(2, 4, 16, dtype=torch.int64, device=device))

    monkeypatch.setattr(validation, "validation_batches", batches)
    lengths = np.ones(60, np.int64)
    with pytest.raises(DataDependentOutputException):
        validation._validate_one(
            stepped,
            range(100),
            lengths,
            config,
            stepped.world,
            lambda: False,  # type: ignore[arg-type]
        )
    assert done == [0, 1, 2]
