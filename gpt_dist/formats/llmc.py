"""llm.c's weight files (github.com/karpathy/llm.c, ``write_model`` in train_gpt2.py).

256 little-endian int32 (magic 20240326, version 3 = fp32 or 5 = bf16, context length, vocabulary,
layers, heads, width, padded vocabulary), then the tensors, each kind for all layers in turn.
Matrices are (out, in); the embedding has zero rows up to the padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
LAYER_TENSORS = [
    f"{module}.{kind}"
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
]


def tensor_order(n_layer: int) -> list[str]:
    """Names of the tensors in the order of the file."""
    layers = [f"h.{layer}.{name}" for name in LAYER_TENSORS for layer in range(n_layer)]
    return ["wte.weight", "wpe.weight", *layers, "ln_f.weight", "ln_f.bias"]


def is_llmc_file(path: Path) -> bool:
    """Whether a file begins with llm.c's magic number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def to_llmc(model: GPT, dtype: torch.dtype) -> Iterator[bytes]:
    """The bytes of a weight file, tensor by tensor; absent biases become zeros.

    Args:
        dtype: torch.float32 (version 3) or torch.bfloat16 (version 5).

    Raises:
        UsageError: a model or a dtype that llm.c has not; the message says why.
    """
    config = model.config
    hidden = config.mlp_hidden or 4 * config.n_embd
    reasons = [
        (dtype not in VERSIONS.values(), "its weights are fp32 or bf16"),
        (config.n_layer == 0, "it has no bigram baseline (model.n_layer = 0)"),
        (config.norm == "post", "it has pre-LN blocks only (model.norm = post)"),
        (not config.tie_embeddings, "it ties the head (model.tie_embeddings = false)"),
        (hidden != 4 * config.n_embd, f"its MLP is 4 * n_embd wide (model.mlp_hidden = {hidden})"),
    ]
    for wrong, why in reasons:
        if wrong:
            raise UsageError(f"llm.c cannot hold this model: {why}")
    return _chunks(model, dtype)


def _chunks(model: GPT, dtype: torch.dtype) -> Iterator[bytes]:
    config = model.config
    rows = -(-model.vocab_size // PADDING) * PADDING
    version = next(number for number, kind in VERSIONS.items() if kind == dtype)
    fields = [MAGIC, version, config.context_length, model.vocab_size]
    fields += [config.n_layer, config.n_head, config.n_embd, rows]
    yield np.array(fields + [0] * (256 - len(fields)), dtype="<i4").tobytes()
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    for name in tensor_order(config.n_layer):
        if name == "wte.weight":
            tensor = torch.zeros(rows, config.n_embd)
            tensor[: model.vocab_size] = weights[name][: model.vocab_size]
        elif name in weights:
            tensor = weights[name]
        else:
            tensor = torch.zeros(len(weights[name.replace(".bias", ".weight")]))
        yield tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def read_llmc(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """A weight file's shape and its tensors, one at a time.

    Returns:
        The configuration and an iterator of (name as in ``GPT``, fp32 tensor).

    Raises:
        GptDistError: not such a file, another version, or not as long as its header says.
    """
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != MAGIC:
        raise GptDistError(f"{path}: not an llm.c weight file (magic {MAGIC})")
    version, context, vocab, layers, heads, width, rows = map(int, header[1:8])
    if version not in VERSIONS:
        raise GptDistError(f"{path}: version {version}; valid are 3 (fp32) and 5 (bf16)")
    if min(context, vocab, layers, heads, width) < 1 or rows < vocab or width % heads:
        raise GptDistError(f"{path}: its header makes no sense: {header[1:8].tolist()}")
    config = ModelConfig(
        n_layer=layers, n_head=heads, n_embd=width, context_length=context, vocab_size=vocab
    )
    dtype = VERSIONS[version]
    shape_of = _shapes(config, rows)
    order = tensor_order(layers)
    count = sum(int(np.prod(shape_of(name))) for name in order)
    expected = HEADER_BYTES + dtype.itemsize * count
    if path.stat().st_size != expected:
        raise GptDistError(
            f"{path}: {path.stat().st_size} bytes, but its header asks for {expected}; truncated?"
        )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER_BYTES)
        offset = 0
        for name in order:
            shape = shape_of(name)
            size = int(np.prod(shape)) * dtype.itemsize
            part = torch.from_numpy(data[offset : offset + size].copy()).view(dtype).view(shape)
            offset += size
            yield name, (part[:vocab] if name == "wte.weight" else part).float()

    return config, tensors()


def _shapes(config: ModelConfig, rows: int) -> Callable[[str], tuple[int, ...]]:
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    shapes["wte.weight"] = (rows, config.n_embd)
    return shapes.__getitem__
