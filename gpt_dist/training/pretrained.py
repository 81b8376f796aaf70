"""Starting from trained weights: ``train.init_from``, which also says what shape the model has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from gpt_dist.checkpoints.checkpoint import candidates, read_state, resolve
from gpt_dist.checkpoints.reader import describe_model, load_model, load_weights
from gpt_dist.config.conflicts import shape_problems
from gpt_dist.config.settings import Config, ModelConfig, show
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.model.empty import empty_model
from gpt_dist.model.gpt import GPT, VOCAB_PARAMETERS
from gpt_dist.text.tokenizers import Tokenizer

BIASES = ("bias", "qkv_bias")


def with_source_shape(config: Config, tokenizer: Tokenizer | None, ranks: int) -> Config:
    """The configuration with the shape of ``train.init_from``, where the user set no other.

    A run that exists already has a shape; then ``train.init_from`` is not read.

    Args:
        config: the run's configuration; without ``train.init_from`` it is returned as it is.
        tokenizer: of the data; None where there is no data to compare.
        ranks: of the run.

    Raises:
        UsageError: the weights have another tokenizer, a setting contradicts their shape, or the
            shape does not fit the batch.
        GptDistError: the weights' description is damaged.
    """
    if config.train.init_from is None:
        return config
    source = shape_of_run(config)
    if source is None:
        source, other = describe_model(config.train.init_from)
        check_tokenizer(config, tokenizer, other)
        check_shape(config, source)
    if not config.unset_shape:
        return config
    update = {key: getattr(source, key) for key in config.unset_shape}
    config = config.model_copy(update={"model": config.model.model_copy(update=update)})
    if problems := shape_problems(config, ranks):
        raise UsageError("\n".join(problems))
    return config


def shape_of_run(config: Config) -> ModelConfig | None:
    """The model of the run that this one continues, as far as a checkpoint can be read."""
    paths = candidates(Path(config.out_dir) / "checkpoints")
    with suppress(GptDistError):
        if config.resume not in ("auto", "never"):
            paths = [resolve(config.resume), *paths]
    for path in paths if config.resume != "never" else []:
        with suppress(GptDistError):
            return ModelConfig.model_validate(read_state(path)["config"]["model"])
    return None


def check_tokenizer(config: Config, tokenizer: Tokenizer | None, other: Tokenizer) -> None:
    """Check that weights were trained on the tokens of the data.

    Raises:
        UsageError: the tokenizers differ.
    """
    if tokenizer is not None and other.to_dict() != tokenizer.to_dict():
        raise UsageError(
            f"train.init_from = {config.train.init_from}: its tokenizer ({other.name}, "
            f"{other.vocab_size} tokens) is not the data's ({tokenizer.name}, "
            f"{tokenizer.vocab_size}); prepare the data with "
            f"--tokenizer {config.train.init_from}"
        )


def check_shape(config: Config, source: ModelConfig) -> None:
    """Check that no setting of the user contradicts the shape of weights.

    Biases that are switched off are let through, because those of the weights may be zeros; and so
    is a larger vocabulary.

    Raises:
        UsageError: naming every setting that does.
    """
    mine = config.model.model_fields_set & source.shape.keys()
    wanted = source.model_copy(update={key: getattr(config.model, key) for key in mine}).shape
    problems = []
    for key, has in source.shape.items():
        wants = wanted[key]
        fits = wants == has or (key in BIASES and not wants)
        if key == "vocab_size":
            fits = wants is None or wants >= has
        if key in mine and not fits:
            problems.append(
                f"model.{key} = {show(wants)}: train.init_from = {config.train.init_from} has "
                f"{show(has)}; leave model.{key} out"
            )
    if problems:
        raise UsageError("\n".join(problems))


def pretrained(config: Config) -> GPT:
    """A model of the configured shape with the weights of ``train.init_from``, on the CPU.

    Raises:
        UsageError: the weights have biases that the model is to lack.
        GptDistError: they have another shape, or are damaged.
    """
    source, _, _ = load_model(config.train.init_from or "")
    model = empty_model(config.model)
    load_weights(model, fitting(source, model), config.train.init_from)
    return model


def fitting(source: GPT, model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model, without padding rows and without biases of zeros that another lacks.

    Formats that have no models without bias, such as Hugging Face's, store zeros instead.
    """
    for name, parameter in source.named_parameters():
        if name not in model.shapes and name.endswith(".bias"):
            if parameter.any():
                key = "qkv_bias" if name.endswith("c_attn.bias") else "bias"
                raise UsageError(
                    f"model.{key} = false: the weights of train.init_from have a bias that is not "
                    f"zero ({name}); leave model.{key} out"
                )
            continue
        yield name, parameter[: source.vocab_size] if name in VOCAB_PARAMETERS else parameter
