"""One trainer in its own process, for ``benchmarks/training.py``: gpt_dist or a peer.

Its only argument is a JSON object of settings. It answers each line of its standard input, such as
``{"accumulate": 8, "steps": 2}``, with one line of JSON: the seconds and the loss of each step, and
the peak memory since the line before. Each peer runs at its best setting: compiled, autocast, fused
AdamW, PyTorch's fused attention, tied embeddings, padded vocabulary. In a name, ``-eager`` leaves
out compiling and ``-fp32`` autocast.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from busiest import profiled
from torch import Tensor

Step = Callable[[Tensor, int], float]
"""Tokens (accumulate * B, T + 1) and the number of micro-batches → mean loss in nats."""


def make_own(settings: dict[str, Any], device: torch.device) -> Step:
    """gpt_dist's engine, called as the training loop calls it."""
    from gpt_dist.config.settings import Config
    from gpt_dist.data.loader import Batch
    from gpt_dist.model.gpt import GPT
    from gpt_dist.parallel.compiling import compile_blocks
    from gpt_dist.parallel.world import World
    from gpt_dist.training.memory import keep_freed_memory
    from gpt_dist.training.setup import make_engine

    shape, context = settings["shape"], settings["context"]
    engines: dict[int, Any] = {}
    world = World(0, 1, 0, 1, device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    dtype = getattr(torch, settings["dtype"])

    def step(tokens: Tensor, accumulate: int) -> float:
        if not engines:
            config = Config.model_validate(
                {
                    "model": {
                        **shape,
                        "context_length": context,
                        "vocab_size": settings["vocabulary"],
                    },
                    "train": {
                        "batch_tokens": accumulate * settings["micro_batch"] * context,
                        "micro_batch_size": settings["micro_batch"],
                    },
                }
            )
            model = GPT(config.model).to(device).train()
            compile_blocks(model, world, config, dtype)
            engines[0] = make_engine(model, world, config, dtype)
        engine = engines[0]
        engine.loss_scale = 1 / (tokens.shape[0] * context)
        total = torch.zeros((), device=device)
        for number, part in enumerate(tokens.chunk(accumulate)):
            batch = Batch(part[:, :-1], part[:, 1:])
            total += engine.micro_step(batch, last=number == accumulate - 1)
        engine.step(settings["lr"])
        return float(total) / (tokens.shape[0] * context)

    return step


def make_peer(settings: dict[str, Any], device: torch.device) -> Step:
    """transformers or litgpt in the usual PyTorch loop."""
    torch.manual_seed(0)
    name, *without = settings["name"].split("-")
    settings = {**settings, "compile": "eager" not in without}
    bf16 = settings["dtype"] == "bfloat16" and "fp32" not in without
    loss_of = {"transformers": make_transformers, "litgpt": make_litgpt}[name](settings)
    model: torch.nn.Module = loss_of.model.to(device).train()  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["lr"], betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(tokens: Tensor, accumulate: int) -> float:
        total = torch.zeros((), device=device)
        for part in tokens.chunk(accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous())
            (loss / accumulate).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total) / accumulate

    return step


class Loss:
    """A model, compiled or not, and its loss function."""

    def __init__(self, model: torch.nn.Module, loss: Callable[..., Tensor], compiled: bool) -> None:
        self.model = model
        self.run = torch.compile(model) if compiled else model
        self.loss = loss

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.run, ids, targets)


def padded(settings: dict[str, Any]) -> int:
    """Size of the vocabulary, rounded up to a multiple of 64 as nanoGPT does."""
    size: int = settings["vocabulary"]
    return -(-size // 64) * 64


def make_transformers(settings: dict[str, Any]) -> Loss:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = settings["shape"]
    config = GPT2Config(
        vocab_size=padded(settings),
        n_positions=settings["context"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
        use_cache=False,
    )

    def loss(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = model(input_ids=ids, shift_labels=targets, labels=targets).loss
        return result

    return Loss(GPT2LMHeadModel(config), loss, settings["compile"])


def make_litgpt(settings: dict[str, Any]) -> Loss:
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    shape = settings["shape"]
    config = Config(
        name="gpt2-shaped",
        block_size=settings["context"],
        vocab_size=settings["vocabulary"],
        padded_vocab_size=padded(settings),
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        rotary_percentage=0.25,  # litgpt has no learned positions
        parallel_residual=False,
        bias=True,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight  # as --tie_embeddings does

    def loss(run: Any, ids: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = chunked_cross_entropy(run(ids), targets, chunk_size=0)
        return result

    return Loss(model, loss, settings["compile"])


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak memory since ``reset_peak``: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries out of the answers
    device = torch.device(settings["device"])
    if device.type == "cpu":
        torch.set_num_threads(settings["threads"])
    else:
        torch.set_float32_matmul_precision("high")
    make = make_own if settings["name"] == "gpt_dist" else make_peer
    step = make(settings, device)
    tokens = torch.load(settings["tokens"], weights_only=True).to(device)
    position = 0
    for line in sys.stdin:
        request = json.loads(line)
        rows = request["accumulate"] * settings["micro_batch"]
        if request.get("profile"):
            batch = tokens[:rows]
            kernels = profiled(functools.partial(step, batch, 1), device.type)
            print(json.dumps({"kernels": kernels}), file=answers, flush=True)
            continue
        reset_peak(device)
        seconds, losses = [], []
        for _ in range(request["steps"]):
            chosen = torch.arange(position, position + rows, device=device) % len(tokens)
            batch, position = tokens[chosen], position + rows
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            losses.append(step(batch, request["accumulate"]))
            seconds.append(time.perf_counter() - start)
        reply = {"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes(device)}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
