"""CTranslate2's generator."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from engines import NEW, TOP_K, VOCABULARY, Run

PACKAGES = ("ctranslate2", "numpy", "safetensors")
VARIANTS = {
    f"CTranslate2 {dtype}": [{"dtype": name}]
    for dtype, name in (("fp32", "float32"), ("int8", "int8"))
}


def make(settings: dict[str, Any]) -> Run:
    import ctranslate2

    generator = ctranslate2.Generator(
        settings["model"],
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


def convert(exported: Path, out: Path, settings: dict[str, Any]) -> None:
    """Write GPT-2 as a CTranslate2 model. Its own converter would read a tokenizer, too."""
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec
    from safetensors.numpy import load_file

    config = json.loads((exported / "config.json").read_text())
    given = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(exported / "model.safetensors").items()
    }

    def linear(spec: Any, name: str) -> None:
        spec.weight = np.ascontiguousarray(given[f"{name}.weight"].T)
        spec.bias = given[f"{name}.bias"]

    def norm(spec: Any, name: str) -> None:
        spec.gamma, spec.beta = given[f"{name}.weight"], given[f"{name}.bias"]

    spec = TransformerDecoderModelSpec.from_config(
        num_layers=config["n_layer"], num_heads=config["n_head"], pre_norm=True,
        activation=Activation.GELUTanh,
    )  # fmt: skip
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = given["wte.weight"]
    decoder.position_encodings.encodings = given["wpe.weight"]
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
    out.mkdir()
    spec.save(str(out))
