"""Models without initial weights: for their shapes, or for weights that are about to be loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gpt_dist.config.settings import ModelConfig
from gpt_dist.model.gpt import GPT


class _SkipInit(TorchFunctionMode):
    """Skips ``torch.nn.init``.

    It saves the time to draw the values. On the meta device there are none, but ``normal_``
    imports torch._dynamo there, which takes seconds; so does ``to_empty`` with sympy.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def meta_model(config: ModelConfig) -> GPT:
    """Build a model on the meta device: its parameters have shapes and no values."""
    with torch.device("meta"), _SkipInit():
        return GPT(config)


def empty_model(config: ModelConfig) -> GPT:
    """Build a model in memory whose weights are uninitialised."""
    with _SkipInit():
        return GPT(config)
