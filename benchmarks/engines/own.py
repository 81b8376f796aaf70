"""This project's decoder. At batch 1 also the share of the memory bandwidth that a step uses."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from engines import NEW, PROMPT, TOP_K, Run

VARIANTS = {f"gpt_dist {dtype}": [{"dtype": dtype}] for dtype in ("fp32", "bf16", "int8")}
WEIGHTS = {"fp32": 4, "bf16": 2, "int8": 1}
"""Bytes per weight."""


def make(settings: dict[str, Any]) -> Run:
    import torch
    from bandwidth import bandwidth

    from gpt_dist.checkpoints.reader import load_model
    from gpt_dist.inference.decoder import Decoder
    from gpt_dist.inference.sampling import SamplingParams

    began = time.perf_counter()
    model, _, _ = load_model(settings["exported"])
    decoder = Decoder(model, max_slots=32, dtype=settings["dtype"])
    size = model.num_parameters(embeddings=False) * WEIGHTS[settings["dtype"]]

    def start(slot: int, ids: np.ndarray) -> None:
        decoder.prefill(slot, ids[:-1])
        decoder.activate(slot, SamplingParams(top_k=TOP_K, seed=slot), ids)

    start(0, np.arange(PROMPT))
    decoder.step()
    decoder.free(0)
    ready = time.perf_counter() - began
    bandwidth()

    def run(prompts: np.ndarray) -> dict[str, Any]:
        before = bandwidth() if len(prompts) == 1 else 0.0
        began = time.perf_counter()
        for slot, ids in enumerate(prompts):
            start(slot, ids)
        decoder.flush()
        prefilled = time.perf_counter()
        steps = []
        for _ in range(NEW):
            step = time.perf_counter()
            decoder.step()
            steps.append(time.perf_counter() - step)
        ended = time.perf_counter()
        for slot in range(len(prompts)):
            decoder.free(slot)
        result = {
            "seconds": ended - began,
            "prefill_seconds": prefilled - began,
            "step_ms": statistics.median(steps) * 1e3,
            "ready_seconds": ready,
        }
        if len(prompts) == 1:
            speed = (before + bandwidth()) / 2
            result["bandwidth_gb_per_second"] = speed / 1e9
            result["share_of_bandwidth"] = size / statistics.median(steps) / speed
        return result

    torch.manual_seed(0)
    return run
