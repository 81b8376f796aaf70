"""One decoder in its own process, for ``benchmarks/serving.py``: this project's or a peer's.

Its only argument is JSON settings. It answers each line on stdin, such as ``{"batch": 8}``, with a
line of JSON: the seconds for 64 new tokens after prompts of 64 tokens in 8 sequences, with top-k
50. A peer runs in its own environment, without this project.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = NEW = 64
TOP_K = 50
VOCABULARY = 50257
WEIGHTS = {"fp32": 4, "bf16": 2, "int8": 1}
"""Bytes per weight."""

Run = Callable[[np.ndarray], dict[str, Any]]
"""Prompts (batch, PROMPT) → seconds and further results."""


def make_own(settings: dict[str, Any]) -> Run:
    """This project's decoder. Also reports the share of the memory bandwidth that a step uses."""
    import torch
    from bandwidth import bandwidth

    from gpt_dist.checkpoints.reader import load_model
    from gpt_dist.inference.decoder import Decoder
    from gpt_dist.inference.sampling import SamplingParams

    began = time.perf_counter()
    model, _, _ = load_model(settings["checkpoint"])
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


def make_transformers(settings: dict[str, Any]) -> Run:
    """``generate`` of Hugging Face transformers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(attn_implementation=settings["attention"], use_cache=True)
    model = GPT2LMHeadModel(config).to(getattr(torch, settings["dtype"])).eval()
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


def make_ctranslate2(settings: dict[str, Any]) -> Run:
    """CTranslate2's generator on the same random weights."""
    import ctranslate2

    generator = ctranslate2.Generator(
        settings["directory"],
        device="cpu",
        compute_type=settings["dtype"],
        intra_threads=settings["threads"],
    )

    def run(prompts: np.ndarray) -> dict[str, Any]:
        tokens = [[str(token) for token in ids] for ids in prompts]
        began = time.perf_counter()
        made = generator.generate_batch(
            tokens, sampling_topk=TOP_K, max_length=NEW, min_length=NEW,
            include_prompt_in_result=False,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        assert all(len(result.sequences_ids[0]) == NEW for result in made)
        return {"seconds": seconds}

    return run


def convert(weights: str, directory: str) -> None:
    """Write random GPT-2 weights (an .npz with Hugging Face's names) as a CTranslate2 model."""
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    from_file = np.load(weights)

    def linear(spec: Any, name: str) -> None:
        spec.weight = from_file[f"{name}.weight"]
        spec.bias = from_file[f"{name}.bias"]

    def norm(spec: Any, name: str) -> None:
        spec.gamma, spec.beta = from_file[f"{name}.weight"], from_file[f"{name}.bias"]

    spec = TransformerDecoderModelSpec.from_config(
        num_layers=12, num_heads=12, pre_norm=True, activation=Activation.GELUTanh
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = from_file["wte.weight"]
    decoder.projection.weight = from_file["wte.weight"]
    decoder.position_encodings.encodings = from_file["wpe.weight"]
    norm(decoder.layer_norm, "ln_f")
    for index, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{index}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{index}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{index}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{index}.ln_2")
        linear(layer.ffn.linear_0, f"h.{index}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{index}.mlp.c_proj")
    spec.register_vocabulary([str(token) for token in range(VOCABULARY)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(VOCABULARY - 1)
    spec.validate()
    Path(directory).mkdir()
    spec.save(directory)


def main() -> None:
    settings = json.loads(sys.argv[1])
    if settings["name"] == "convert":
        convert(settings["weights"], settings["directory"])
        return
    makers = {
        "gpt_dist": make_own, "transformers": make_transformers, "ctranslate2": make_ctranslate2
    }  # fmt: skip
    run = makers[settings["name"]](settings)
    dice = np.random.default_rng(0)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        prompts = dice.integers(0, VOCABULARY - 1, (json.loads(line)["batch"], PROMPT))
        print(json.dumps(run(prompts)), flush=True)


if __name__ == "__main__":
    main()
