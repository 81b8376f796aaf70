"""llama.cpp through its C API: continuous batching with flash attention, as its own server does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from engines import NEW, PROMPT, TOP_K, Run

PACKAGES = ("llama-cpp-python==0.3.36", "gguf", "numpy", "safetensors")
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
VARIANTS = {
    f"llama.cpp {dtype}": [{"dtype": name}]
    for dtype, name in (("fp32", "F32"), ("bf16", "BF16"), ("int8", "Q8_0"))
}
MOST = 32
"""Sequences at once."""


def make(settings: dict[str, Any]) -> Run:
    import llama_cpp as llama

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        str(Path(settings["model"]) / "model.gguf").encode(), llama.llama_model_default_params()
    )
    options = llama.llama_context_default_params()
    options.n_ctx = MOST * (PROMPT + NEW)
    options.n_batch, options.n_ubatch, options.n_seq_max = MOST * PROMPT, 512, MOST
    options.n_threads = options.n_threads_batch = settings["threads"]
    options.flash_attn_type, options.kv_unified = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED, False
    context = llama.llama_init_from_model(model, options)
    batch = llama.llama_batch_init(MOST * PROMPT, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """Run rows of (token, position, sequence, whether its logits are wanted)."""
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        assert llama.llama_decode(context, batch) == 0

    def sampler(seed: int) -> Any:
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_top_k(TOP_K))
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
        return chain

    def run(prompts: np.ndarray) -> dict[str, Any]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        chains = [sampler(seed) for seed in range(len(prompts))]
        began = time.perf_counter()
        decode(
            [
                (int(token), position, sequence, position == PROMPT - 1)
                for sequence, ids in enumerate(prompts)
                for position, token in enumerate(ids)
            ]
        )
        last = [PROMPT * (sequence + 1) - 1 for sequence in range(len(prompts))]
        for position in range(PROMPT, PROMPT + NEW):
            tokens = [
                llama.llama_sampler_sample(chain, context, row)
                for chain, row in zip(chains, last, strict=True)
            ]
            if position < PROMPT + NEW - 1:
                decode([(token, position, seq, True) for seq, token in enumerate(tokens)])
            last = list(range(len(prompts)))
        seconds = time.perf_counter() - began
        for chain in chains:
            llama.llama_sampler_free(chain)
        return {"seconds": seconds}

    return run


def convert(exported: Path, out: Path, settings: dict[str, Any]) -> None:
    """Write GPT-2 as GGUF, without a vocabulary: ids go in and come out."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((exported / "config.json").read_text())
    kind = gguf.GGMLQuantizationType[settings["dtype"]]
    out.mkdir()
    writer = gguf.GGUFWriter(out / "model.gguf", "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}" if kind else "ALL_F32"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    for name, tensor in load_file(exported / "model.safetensors").items():
        if name == "lm_head.weight":  # the embedding once more
            continue
        matrix = ".c_" in name and name.endswith("weight")
        data = np.ascontiguousarray(tensor.T if matrix else tensor)
        to = kind if matrix or name.endswith("wte.weight") else gguf.GGMLQuantizationType.F32
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(found, gguf.quants.quantize(data, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
