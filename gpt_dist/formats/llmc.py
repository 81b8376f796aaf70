"""llm.c's weight files (github.com/karpathy/llm.c, ``write_model`` in train_gpt2.py).

A file begins with 256 little-endian int32: magic 20240326, version (3 = fp32, 5 = bf16), context
length, vocabulary, layers, heads, width, padded vocabulary, and zeros. The tensors follow, each
kind for all layers in turn. Matrices are (out, in). The embedding is padded with zero rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.model.gpt import GPT

MAGIC = 20240326
HEADER_BYTES = 1024
PADDING = 128
VERSIONS = {3: torch.float32, 5: torch.bfloat16}


def block_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors of one block, in the order of the file."""
    weights = {
        "ln_1": (width,),
        "attn.c_attn": (3 * width, width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for module, shape in weights.items():
        shapes[f"{module}.weight"], shapes[f"{module}.bias"] = shape, shape[:1]
    return shapes


def tensor_shapes(config: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of all tensors, in the order of the file: each kind for all layers in turn.

    Args:
        config: the model's shape.
        rows: of the embedding, padding included.
    """
    width = config.n_embd
    return {
        "wte.weight": (rows, width),
        "wpe.weight": (config.context_length, width),
        **{
            f"h.{layer}.{name}": shape
            for name, shape in block_shapes(width).items()
            for layer in range(config.n_layer)
        },
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }


def is_llmc_file(path: Path) -> bool:
    """Whether a file begins with llm.c's magic number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def to_llmc(model: GPT, dtype: torch.dtype) -> Iterator[bytes]:
    """The bytes of a weight file, tensor by tensor. Biases that the model lacks are zeros.

    Args:
        dtype: torch.float32 (version 3) or torch.bfloat16 (version 5).

    Raises:
        UsageError: llm.c does not support the model or the dtype; the message says why.
    """
    config = model.config
    hidden = config.mlp_hidden or 4 * config.n_embd
    reasons = [
        (dtype not in VERSIONS.values(), "its files hold fp32 or bf16"),
        (
            config.architecture != "gpt2",
            f"its models are GPT-2s (model.architecture = {config.architecture})",
        ),
        (
            config.n_layer == 0,
            "it needs at least one layer (model.n_layer = 0, the bigram baseline)",
        ),
        (config.norm == "post", "its blocks are pre-LN (model.norm = post)"),
        (not config.tie_embeddings, "its head shares the embedding (model.tie_embeddings = false)"),
        (hidden != 4 * config.n_embd, f"its MLP is 4 * n_embd wide (model.mlp_hidden = {hidden})"),
    ]
    for wrong, why in reasons:
        if wrong:
            raise UsageError(f"unsupported by llm.c: {why}")
    return _chunks(model, dtype)


def _chunks(model: GPT, dtype: torch.dtype) -> Iterator[bytes]:
    config = model.config
    rows = -(-model.vocab_size // PADDING) * PADDING
    version = next(number for number, kind in VERSIONS.items() if kind == dtype)
    fields = [MAGIC, version, config.context_length, model.vocab_size]
    fields += [config.n_layer, config.n_head, config.n_embd, rows]
    yield np.array(fields + [0] * (256 - len(fields)), dtype="<i4").tobytes()
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    for name, shape in tensor_shapes(config, rows).items():
        tensor = weights[name] if name in weights else torch.zeros(shape)
        if name == "wte.weight":
            tensor = torch.zeros(shape)
            tensor[: model.vocab_size] = weights[name][: model.vocab_size]
        yield tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def read_llmc(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """Read a weight file: its configuration, and its tensors one at a time.

    Returns:
        The configuration and an iterator of (name as in ``GPT``, fp32 tensor).

    Raises:
        GptDistError: another format or version, or the size differs from what the header says.
    """
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != MAGIC:
        raise GptDistError(f"{path}: not an llm.c weight file (magic {MAGIC})")
    version, context, vocab, layers, heads, width, rows = map(int, header[1:8])
    if version not in VERSIONS:
        raise GptDistError(f"{path}: version {version}; valid are 3 (fp32) and 5 (bf16)")
    if min(context, vocab, layers, heads, width) < 1 or rows < vocab or width % heads:
        raise GptDistError(f"{path}: its header is invalid: {header[1:8].tolist()}")
    dtype = VERSIONS[version]
    # First of all, because a damaged or hostile header may hold counts of any size.
    per_block = sum(map(math.prod, block_shapes(width).values()))
    count = (rows + context + 2) * width + layers * per_block
    expected = HEADER_BYTES + dtype.itemsize * count
    if path.stat().st_size != expected:
        raise GptDistError(
            f"{path}: {path.stat().st_size} bytes, but its header says {expected}; truncated?"
        )
    config = ModelConfig(
        n_layer=layers, n_head=heads, n_embd=width, context_length=context, vocab_size=vocab
    )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER_BYTES)
        offset = 0
        for name, shape in tensor_shapes(config, rows).items():
            size = math.prod(shape) * dtype.itemsize
            part = torch.from_numpy(data[offset : offset + size].copy()).view(dtype).view(shape)
            offset += size
            yield name, (part[:vocab] if name == "wte.weight" else part).float()

    return config, tensors()
