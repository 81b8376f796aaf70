"""Models to and from Hugging Face's format: configuration, parameter names, safetensors files.

A pre-LN model is a ``gpt2`` there. A post-LN model is an ``openai-gpt`` (GPT-1), whose MLP is
always 4 * n_embd wide. Both store matrices as (in, out) and have all biases, so biases that our
model lacks become zeros. ``config.json`` says which they are, under ``gpt_dist``; read back, they
are left out again if they are still zeros. This module does not import transformers, and nothing is
ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.formats.hf_tokenizers import read_tokenizer
from gpt_dist.model.empty import meta_model
from gpt_dist.model.gpt import VOCAB_PARAMETERS
from gpt_dist.text.tokenizers import Tokenizer

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Matrices that Hugging Face's Conv1D stores as (in, out) and a linear layer as (out, in)."""

GPT1_NAMES = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}
GELU_TANH = {"gelu_new", "gelu_pytorch_tanh"}
OURS = "gpt_dist"
"""Key of ``config.json`` for what the format itself cannot say."""
EPSILON = 1e-5
"""In every layer norm: the default of PyTorch and of GPT-2."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter of a model. Vocabulary tensors come without padding rows."""
    model = meta_model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in VOCAB_PARAMETERS:
        if name in shapes:
            shapes[name] = (model.vocab_size, config.n_embd)
    return shapes


# --- ours → theirs ------------------------------------------------------------------------------


def to_hf_config(config: ModelConfig, eot_id: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` for a model.

    Args:
        config: of the model, with ``vocab_size`` set.
        eot_id: end-of-text token, or None.
        dtype: of the weights beside it.

    Raises:
        UsageError: transformers has no such architecture; the message says why.
    """
    if config.n_layer == 0:
        raise UsageError(
            "model.n_layer = 0: transformers has no architecture for the bigram baseline, which "
            "lacks positions and layer norm; export a model with n_layer >= 1"
        )
    gpt1 = config.norm == "post"
    hidden = config.mlp_hidden or 4 * config.n_embd
    if gpt1 and hidden != 4 * config.n_embd:
        raise UsageError(
            f"model.mlp_hidden = {hidden}: a model with model.norm = post is exported as "
            f"openai-gpt, whose MLP is always 4 * n_embd = {4 * config.n_embd} wide"
        )
    data: dict[str, Any] = {
        "architectures": ["OpenAIGPTLMHeadModel" if gpt1 else "GPT2LMHeadModel"],
        "model_type": "openai-gpt" if gpt1 else "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        # openai-gpt calls the tanh approximation "gelu".
        **({"afn": "gelu"} if gpt1 else {"activation_function": "gelu_new", "n_inner": hidden}),
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": EPSILON,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
        OURS: {key: config.shape[key] for key in ("bias", "qkv_bias")},
    }
    if not gpt1:
        data |= {"scale_attn_weights": True, "use_cache": True}
    return data


def to_hf_weights(
    config: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Rename and transpose parameters one at a time, and add missing biases as zeros.

    Args:
        config: of the model.
        weights: (name, tensor) as in ``GPT.state_dict()``; padding rows are cut off.
        dtype: of the result.

    Yields:
        (name, contiguous tensor) of ``GPT2LMHeadModel`` or ``OpenAIGPTLMHeadModel``.
    """
    present = set()
    for name, tensor in weights:
        present.add(name)
        kept = tensor[: config.vocab_size] if name in VOCAB_PARAMETERS else tensor
        turned = kept.t() if name.endswith(TRANSPOSED) else kept
        yield hf_name(config, name), turned.to(dtype).contiguous()
    biased = parameter_shapes(config.model_copy(update={"bias": True, "qkv_bias": True}))
    for name, shape in biased.items():
        if name not in present:
            yield hf_name(config, name), torch.zeros(shape, dtype=dtype)


def hf_name(config: ModelConfig, name: str) -> str:
    """``h.0.ln_1.weight`` → ``transformer.h.0.ln_1.weight``."""
    if name == "lm_head.weight":
        return name
    if config.norm == "post":
        name = GPT1_NAMES.get(name, name)
    return f"transformer.{name}"


# --- theirs → ours ------------------------------------------------------------------------------


def load_pretrained(
    directory: str | Path,
) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]], Tokenizer]:
    """Read a Hugging Face directory: configuration, weights one at a time, and tokenizer.

    Some trainers export the padding rows of the embedding. Rows beyond the tokenizer's vocabulary
    are left out.

    Returns:
        The configuration (``vocab_size`` set), an iterator of (our name, fp32 tensor), and the
        tokenizer.

    Raises:
        UsageError: the directory holds no GPT-2 in safetensors files.
        GptDistError: a file is damaged or a tensor is missing. The iterator raises it too.
    """
    directory = Path(directory)
    data = _read_json(directory / "config.json")
    config = from_hf_config(data, directory / "config.json")
    tokenizer = read_tokenizer(directory, config.vocab_size)
    if tokenizer.vocab_size > (config.vocab_size or 0):
        raise GptDistError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but the model's vocab_size is {config.vocab_size}"
        )
    files = weight_files(directory)
    stored_rows = config.vocab_size or 0
    config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    config = without_zeros(config, data.get(OURS), files)
    return config, _read_weights(config, files, stored_rows), tokenizer


def from_hf_config(data: dict[str, Any], where: str | Path) -> ModelConfig:
    """Our configuration for the contents of a ``config.json``.

    Args:
        data: the contents.
        where: the file's name, for error messages.

    Raises:
        UsageError: another architecture, or a variant of GPT-2 that computes something else.
    """
    kind = data.get("model_type")
    if kind not in ("gpt2", "openai-gpt"):
        raise UsageError(
            f"{where}: model_type is {kind!r}; valid are gpt2, and openai-gpt for post-LN models"
        )
    gpt1 = kind == "openai-gpt"
    activation = data.get("afn", "gelu") if gpt1 else data.get("activation_function", "gelu_new")
    epsilon = data.get("layer_norm_epsilon", EPSILON)
    reasons = [
        (activation not in ({"gelu"} if gpt1 else GELU_TANH), f"activation {activation!r}"),
        (epsilon != EPSILON, f"layer_norm_epsilon {epsilon}"),
        (data.get("scale_attn_weights", True) is not True, "scale_attn_weights false"),
        (bool(data.get("scale_attn_by_inverse_layer_idx")), "scale_attn_by_inverse_layer_idx"),
        (bool(data.get("add_cross_attention")), "add_cross_attention"),
        (bool(data.get("quantization_config")), "quantized weights"),
    ]
    for wrong, what in reasons:
        if wrong:
            raise UsageError(f"{where}: {what}: this variant of GPT-2 is not supported")
    try:
        config = ModelConfig(
            n_layer=data.get("n_layer", 12),
            n_head=data.get("n_head", 12),
            n_embd=data.get("n_embd", 768),
            mlp_hidden=data.get("n_inner"),
            context_length=data.get("n_positions", 512 if gpt1 else 1024),
            vocab_size=data.get("vocab_size", 40478 if gpt1 else 50257),
            dropout=data.get("resid_pdrop", 0.1),
            tie_embeddings=data.get("tie_word_embeddings", True),
            norm="post" if gpt1 else "pre",
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"{where}: {key} = {first['input']!r}: {first['msg'].lower()}") from None
    if config.n_layer == 0 or config.n_embd % config.n_head:
        raise UsageError(
            f"{where}: n_layer {config.n_layer}, n_head {config.n_head}, n_embd {config.n_embd}: "
            "not a GPT-2 (n_layer >= 1, n_head divides n_embd)"
        )
    return config


def without_zeros(config: ModelConfig, ours: Any, files: dict[str, Path]) -> ModelConfig:
    """The configuration without the biases that our export added as zeros.

    Args:
        config: with all biases.
        ours: what our export wrote into ``config.json``; anything else where it did not.
        files: tensor name → file. Biases that were trained since are not zeros, and stay.
    """
    try:
        lacking = ModelConfig(bias=ours["bias"], qkv_bias=ours["qkv_bias"])
    except (TypeError, KeyError, ValidationError):
        return config
    smaller = config.model_copy(update={"bias": lacking.bias, "qkv_bias": lacking.qkv_bias})
    opened = {file: open_safetensors(file) for file in set(files.values())}
    for name in parameter_shapes(config).keys() - parameter_shapes(smaller).keys():
        key = _stored_name(config, name, files)
        if key is None or opened[files[key]].get_tensor(key).any():
            return config
    return smaller


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name → safetensors file, from ``model.safetensors.index.json`` if there is one.

    Raises:
        UsageError: no safetensors file.
        GptDistError: a file is missing or truncated; the message names it.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file() and not single.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise GptDistError(f"{index}: lacks a weight_map from tensors to files")
        files = {directory / Path(name).name for name in names.values()}
    elif single.is_file():
        files = {single}
    else:
        pickled = next((f.name for f in sorted(directory.glob("*.bin"))), None)
        hint = f" ({pickled} may be a pickle, which is never loaded)" if pickled else ""
        raise UsageError(f"{directory}: no model.safetensors{hint}")
    return {name: file for file in sorted(files) for name in open_safetensors(file).keys()}  # noqa: SIM118


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file, which checks its header against its size.

    Raises:
        GptDistError: missing, truncated or not a safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise GptDistError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise GptDistError(f"{path}: truncated or not a safetensors file ({error})") from None


def _read_weights(
    config: ModelConfig, files: dict[str, Path], stored_rows: int
) -> Iterator[tuple[str, Tensor]]:
    opened = {file: open_safetensors(file) for file in set(files.values())}
    for name, shape in parameter_shapes(config).items():
        key = _stored_name(config, name, files)
        if key is None:
            where = next(iter(files.values())).parent
            raise GptDistError(f"{where}: the weights lack the tensor {hf_name(config, name)}")
        tensor: Tensor = opened[files[key]].get_tensor(key)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise GptDistError(f"{files[key]}: {key} is {tensor.dtype}; valid are fp32, bf16, fp16")
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        if name in VOCAB_PARAMETERS and len(tensor) == stored_rows:
            tensor = tensor[: config.vocab_size]
        if tuple(tensor.shape) != shape:
            raise GptDistError(
                f"{files[key]}: {key} has the shape {tuple(tensor.shape)}, "
                f"but config.json implies {shape}"
            )
        yield name, tensor.to(torch.float32).contiguous()


def _stored_name(config: ModelConfig, name: str, files: dict[str, Path]) -> str | None:
    """The name of a parameter among stored tensors; None where it is not there."""
    full = hf_name(config, name)
    # The hub's gpt2 uses the names of GPT2Model, which has no prefix and no head.
    return next((k for k in (full, full.removeprefix("transformer.")) if k in files), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; not a Hugging Face model directory") from None
    except (ValueError, OSError) as error:
        raise GptDistError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise GptDistError(f"{path}: expected a JSON object")
    return data
