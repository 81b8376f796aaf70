"""Decoding speed of nanochat beside GPT-2 of the same size, in turns, with random weights.

    python benchmarks/architectures.py --json benchmarks/results/architectures.json

Both have 12 layers of width 768 and an output head of their own. Steps are taken in turns, a few
at a time; the figure is the ratio of the lower quartiles, which other work on the machine disturbs
least.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from record import record
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import run_main
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"architecture": "gpt2", "tie_embeddings": False},
    "nanochat": {"architecture": "nanochat"},
    "nanochat, 3 heads of keys": {"architecture": "nanochat", "n_kv_head": 3},
}
PROMPT, TURN = 200, 4
"""Tokens of a prompt; steps that a model takes at a time."""


def model(name: str) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(**MODELS[name], vocab_size=50257)).eval()


def running(weights: GPT, dtype: Any, batch: int) -> Decoder:
    """A decoder in which every slot is active."""
    decoder = Decoder(weights, max_slots=batch, dtype=dtype)
    prompt = list(range(PROMPT))
    for slot in range(batch):
        decoder.prefill(slot, prompt[:-1])
        decoder.activate(slot, SamplingParams(temperature=0.0), prompt)
    decoder.step()
    return decoder


def seconds(decoders: dict[str, Decoder], turns: int) -> dict[str, float]:
    """Lower quartile of a step's time, by model."""
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(turns):
        for name, decoder in decoders.items():
            began = time.perf_counter()
            for _ in range(TURN):
                decoder.step()
            times[name].append((time.perf_counter() - began) / TURN)
    return {name: float(np.quantile(found, 0.25)) for name, found in times.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Step times by dtype, batch size and model."""
    models = {name: model(name) for name in MODELS}
    results, backend = [], ""
    cases = [(dtype, batch) for dtype in args.dtype for batch in args.batch]
    for dtype, batch in track(cases, "measuring", console=Console(stderr=True)):
        decoders = {name: running(weights, dtype, batch) for name, weights in models.items()}
        backend = decoders["gpt2"].backend
        steps = seconds(decoders, args.turns)
        results.append({"dtype": dtype, "batch": batch, "step_seconds": steps})
    return {
        "backend": backend,
        "parameters": {name: weights.num_parameters() for name, weights in models.items()},
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--note", help="what a reader of the figures must know")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    found = measure(args)
    table = Table("tokens/s", *MODELS)
    for each in found["results"]:
        steps = each["step_seconds"]
        cells = (f"{each['batch'] / s:,.0f} ({steps['gpt2'] / s:.2f})" for s in steps.values())
        table.add_row(f"{each['dtype']}, batch {each['batch']}", *cells)
    Console().print(table)
    record(args.json, found | ({"note": args.note} if args.note else {}))


if __name__ == "__main__":
    run_main(main)
