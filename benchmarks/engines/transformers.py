"""``generate`` of Hugging Face transformers, with each of its attentions and caches."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from engines import NEW, PROMPT, TOP_K, Run

WAYS = [("sdpa", "dynamic"), ("eager", "dynamic"), ("sdpa", "static")]
VARIANTS = {
    f"transformers {dtype}": [
        {"dtype": name, "attention": attention, "cache": cache} for attention, cache in WAYS
    ]
    for dtype, name in (("fp32", "float32"), ("bf16", "bfloat16"))
}


def make(settings: dict[str, Any]) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        settings["exported"],
        attn_implementation=settings["attention"],
        dtype=getattr(torch, settings["dtype"]),
    ).eval()
    options = {
        "do_sample": True, "top_k": TOP_K, "max_new_tokens": NEW, "min_new_tokens": NEW,
        "pad_token_id": 0,
    }  # fmt: skip
    if settings["cache"] == "static":
        options["cache_implementation"] = "static"

    def run(prompts: np.ndarray) -> dict[str, Any]:
        ids = torch.from_numpy(prompts)
        began = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        seconds = time.perf_counter() - began
        assert made.shape == (len(prompts), PROMPT + NEW)
        return {"seconds": seconds}

    return run
