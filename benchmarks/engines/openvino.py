"""OpenVINO GenAI with continuous batching."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from engines import NEW, PROMPT, TOP_K, Run

PACKAGES = ("openvino-genai==2026.4.1", "optimum-intel==2.2.0", "torch==2.13.0", "numpy")
UNWANTED = ("torchvision",)
"""With it, optimum cannot import what converts."""
VARIANTS = {f"OpenVINO {dtype}": [{"dtype": dtype}] for dtype in ("fp32", "bf16", "int8")}
MOST = 32
"""Sequences at once."""


def make(settings: dict[str, Any]) -> Run:
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = MOST, MOST * PROMPT
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    scheduler.dynamic_split_fuse = False
    properties: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": settings["threads"],
        "INFERENCE_PRECISION_HINT": "bf16" if settings["dtype"] == "bf16" else "f32",
    }
    if settings["dtype"] == "int8":
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 128
    pipeline = genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", properties)
    wanted = genai.GenerationConfig(
        do_sample=True, top_k=TOP_K, max_new_tokens=NEW, min_new_tokens=NEW, ignore_eos=True
    )

    def run(prompts: np.ndarray) -> dict[str, Any]:
        ids = [openvino.Tensor(each[None].astype(np.int64)) for each in prompts]
        began = time.perf_counter()
        made = pipeline.generate(ids, [wanted] * len(ids))
        seconds = time.perf_counter() - began
        assert all(len(result.m_generation_ids[0]) == NEW for result in made)
        return {"seconds": seconds}

    return run


def convert(exported: Path, out: Path, settings: dict[str, Any]) -> None:
    """Export with optimum: fp16 weights for bf16, int8 asymmetric by channel for int8."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    quantization = OVWeightQuantizationConfig(bits=8, sym=False)
    options = {"quantization_config": quantization} if settings["dtype"] == "int8" else {}
    model = OVModelForCausalLM.from_pretrained(
        exported, export=True, compile=False, load_in_8bit=False, **options
    )
    if settings["dtype"] == "bf16":
        model.half()
    model.save_pretrained(out)
