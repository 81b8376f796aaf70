"""Models to and from Hugging Face's format: ``config.json`` and safetensors files.

`gpt_dist.formats.hf_layouts` says how each kind of model is described and stored there. Where a
format has biases that our model lacks, they become zeros. ``config.json`` says which they are,
under ``gpt_dist``; read back, they are left out again if they are still zeros. This module does not
import transformers, and nothing is ever unpickled.
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
from gpt_dist.formats.hf_layouts import LAYOUTS, layout_of
from gpt_dist.formats.hf_tokenizers import read_tokenizer
from gpt_dist.model.empty import meta_model
from gpt_dist.model.gpt import VOCAB_PARAMETERS
from gpt_dist.text.tokenizers import Tokenizer

OURS = "gpt_dist"
"""Key of ``config.json`` for what the format itself cannot say."""


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
    layout = layout_of(config)
    data: dict[str, Any] = {
        "architectures": [layout.model_class],
        "model_type": layout.model_type,
        "vocab_size": config.vocab_size,
        **layout.to_config(config),
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if layout.filled(config) != config:
        data[OURS] = {key: config.shape[key] for key in ("bias", "qkv_bias")}
    return data


def to_hf_weights(
    config: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Rename, cut and transpose parameters one at a time, and add missing biases as zeros.

    Args:
        config: of the model.
        weights: (name, tensor) as in ``GPT.state_dict()``; padding rows are cut off.
        dtype: of the result.

    Yields:
        (name, contiguous tensor) of the class in ``config.json``.
    """
    layout, present = layout_of(config), set()
    for name, tensor in weights:
        present.add(name)
        kept = tensor[: config.vocab_size] if name in VOCAB_PARAMETERS else tensor
        pieces = layout.pieces(config, name)
        sizes = [len(kept) if piece.rows is None else piece.rows for piece in pieces]
        for piece, part in zip(pieces, kept.split(sizes), strict=True):
            turned = part.t() if piece.transposed else part
            yield piece.name, turned.to(dtype).contiguous()
    for name, shape in parameter_shapes(layout.filled(config)).items():
        if name not in present:
            yield layout.pieces(config, name)[0].name, torch.zeros(shape, dtype=dtype)


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
        UsageError: the directory holds no model of a known kind in safetensors files.
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
        UsageError: another kind of model, or a variant that computes something else.
    """
    layout = LAYOUTS.get(str(data.get("model_type")))
    if layout is None:
        raise UsageError(
            f"{where}: model_type is {data.get('model_type')!r}; valid are {', '.join(LAYOUTS)}"
        )
    return layout.from_config(data, where)


def without_zeros(config: ModelConfig, ours: Any, files: dict[str, Path]) -> ModelConfig:
    """The configuration without the biases that our export added as zeros.

    Args:
        config: with all biases.
        ours: what our export wrote into ``config.json``; anything else where it did not.
        files: tensor name → file. Biases that were trained since are not zeros, and stay.
    """
    if layout_of(config).filled(config) == config:
        return config
    try:
        lacking = ModelConfig(bias=ours["bias"], qkv_bias=ours["qkv_bias"])
    except (TypeError, KeyError, ValidationError):
        return config
    smaller = config.model_copy(update={"bias": lacking.bias, "qkv_bias": lacking.qkv_bias})
    opened = {file: open_safetensors(file) for file in set(files.values())}
    for name in parameter_shapes(config).keys() - parameter_shapes(smaller).keys():
        key = _stored_name(config, layout_of(config).pieces(config, name)[0].name, files)
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
        parts = []
        for piece in layout_of(config).pieces(config, name):
            key = _stored_name(config, piece.name, files)
            if key is None:
                where = next(iter(files.values())).parent
                raise GptDistError(f"{where}: the weights lack the tensor {piece.name}")
            part: Tensor = opened[files[key]].get_tensor(key)
            if not part.is_floating_point() or part.dtype.itemsize < 2:
                raise GptDistError(
                    f"{files[key]}: {key} is {part.dtype}; valid are fp32, bf16, fp16"
                )
            if piece.transposed:
                part = part.t()
            if name in VOCAB_PARAMETERS and len(part) == stored_rows:
                part = part[: config.vocab_size]
            wanted = shape if piece.rows is None else (piece.rows, *shape[1:])
            if tuple(part.shape) != wanted:
                raise GptDistError(
                    f"{files[key]}: {key} has the shape {tuple(part.shape)}, "
                    f"but config.json implies {wanted}"
                )
            parts.append(part.to(torch.float32))
        yield name, torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def _stored_name(config: ModelConfig, name: str, files: dict[str, Path]) -> str | None:
    """The name of one of their tensors among stored ones; None where it is not there."""
    # The hub's gpt2 uses the names of GPT2Model, which has no prefix and no head.
    short = name.removeprefix(layout_of(config).prefix)
    return next((key for key in (name, short) if key in files), None)


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
