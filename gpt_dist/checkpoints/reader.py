"""Reading a checkpoint's tensors, into a run that continues or into a model alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_dist.checkpoints.checkpoint import read_state, resolve, verify
from gpt_dist.checkpoints.tensor_files import TensorFile
from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.formats.hf import load_pretrained
from gpt_dist.model.empty import empty_model
from gpt_dist.model.gpt import GPT, VOCAB_PARAMETERS
from gpt_dist.text.tokenizers import Tokenizer, load_tokenizer


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row for each token. Files hold it without padding rows."""
    return any(name.endswith(f".{parameter}") for parameter in VOCAB_PARAMETERS)


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Append zero rows up to ``rows``, as the model holds a vocabulary tensor."""
    missing = rows - tensor.shape[0]
    return (
        torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing > 0 else tensor
    )


class CheckpointReader:
    """The tensors of a checkpoint's files, by the names of ``Engine.full_state``.

    Args:
        directory: the checkpoint.
        model: the model that they are for; it says how many padding rows it has.
    """

    def __init__(self, directory: Path, model: GPT) -> None:
        self._files = {
            part: TensorFile(directory / f"{part}.safetensors") for part in ("model", "optimizer")
        }
        self._rows = model.shapes["wte.weight"][0]  # the parameter itself may be partitioned

    def __call__(self, name: str) -> Tensor:
        """The tensor ``model.<parameter>`` or ``optimizer.<state>.<parameter>``, with padding rows.

        Raises:
            GptDistError: the checkpoint lacks it.
        """
        part, _, key = name.partition(".")
        tensor = self._files[part](key)
        return pad_rows(tensor, self._rows) if is_vocabulary(name) else tensor

    def __contains__(self, name: str) -> bool:
        part, _, key = name.partition(".")
        return key in self._files[part].names

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter, tensor) of the whole model, without padding rows."""
        file = self._files["model"]
        return ((name, file(name)) for name in sorted(file.names))


def load_weights(model: GPT, tensors: Iterable[tuple[str, Tensor]], source: object) -> None:
    """Copy named tensors into a model. Every parameter must be among them, in its shape.

    Args:
        model: what to copy into.
        tensors: (parameter, tensor); vocabulary tensors may come without padding rows.
        source: where they are from, for error messages.

    Raises:
        GptDistError: naming the parameter that is missing, unknown or misshapen.
    """
    wanted = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            parameter = wanted.pop(name, None)
            if parameter is None:
                raise GptDistError(f"{source}: contains a tensor that this model lacks: {name}")
            full = pad_rows(tensor, parameter.shape[0]) if name in VOCAB_PARAMETERS else tensor
            if full.shape != parameter.shape:
                raise GptDistError(
                    f"{source}: {name} has the shape {list(tensor.shape)}, "
                    f"but this model expects {list(parameter.shape)}"
                )
            parameter.copy_(full)
    if wanted:
        raise GptDistError(f"{source}: lacks the tensor {min(wanted)}")


def describe_model(path: str | Path) -> tuple[ModelConfig, Tokenizer]:
    """The shape and the tokenizer of what ``load_model`` would load, without its matrices.

    Raises:
        UsageError: there is nothing to load.
        GptDistError: a file is missing or damaged.
    """
    directory = resolve(path)
    if (directory / "config.json").is_file():
        config, _, tokenizer = load_pretrained(directory)
        return config, tokenizer
    model = ModelConfig.model_validate(read_state(directory)["config"]["model"])
    return model, load_tokenizer(directory)


def load_model(
    path: str | Path, device: str | torch.device = "cpu", *, average: bool = False
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Load a model for inference or fine-tuning from anything that ``resolve`` accepts.

    Args:
        path: what to load.
        device: where to.
        average: load the average of the weights (``optim.average``) in their place.

    Returns:
        The model in evaluation mode, its tokenizer, and ``state.json``. Of an exported model, which
        has no ``state.json``, a dictionary with ``config`` alone.

    Raises:
        UsageError: there is nothing to load, or no average.
        GptDistError: a file is missing, damaged or of another model.
    """
    directory = resolve(path)
    if (directory / "config.json").is_file():
        if average:
            raise UsageError(f"{path}: an exported model, without a run's average of its weights")
        config, tensors, tokenizer = load_pretrained(directory)
        model = empty_model(config)
        load_weights(model, tensors, directory)
        return model.to(device).eval(), tokenizer, {"config": {"model": config.model_dump()}}
    state = read_state(directory)
    verify(directory, state, optimizer=average)
    model = empty_model(ModelConfig.model_validate(state["config"]["model"]))
    prefix = "average." if average else ""
    file = TensorFile(directory / f"{'optimizer' if average else 'model'}.safetensors")
    names = [name for name in sorted(file.names) if name.startswith(prefix)]
    if not names:
        raise UsageError(
            f"{directory}: holds no average of the weights; a run has one with optim.average above "
            "0, in the last part of its steps"
        )
    load_weights(model, ((name.removeprefix(prefix), file(name)) for name in names), file.path)
    return model.to(device).eval(), load_tokenizer(directory), state
