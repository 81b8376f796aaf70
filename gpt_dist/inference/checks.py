"""What a decoder refuses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import UsageError


def check_same_shape(given: ModelConfig, needed: ModelConfig) -> None:
    """Raise a ``UsageError`` that names what differs between the shapes of two models."""
    for key, value in needed.shape.items():
        if given.shape[key] != value:
            raise UsageError(f"model.{key} = {given.shape[key]}: these weights need {value}")


def checked_tokens(
    ids: Sequence[int] | np.ndarray, start: int, context: int, vocab_size: int
) -> np.ndarray:
    """Token ids as int64.

    Args:
        ids: (T,) token ids.
        start: position of the first of them.
        context: how many positions there are.
        vocab_size: ids must be below it.

    Raises:
        UsageError: they do not fit into the context, or an id is not in the vocabulary.
    """
    tokens = np.asarray(ids, np.int64)
    if start + len(tokens) > context:
        raise UsageError(f"{start + len(tokens)} tokens do not fit the context of {context}")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise UsageError(f"token {wrong} is not in the vocabulary of {vocab_size}")
    return tokens
