"""Decoders beside each other, each in its own process: this project's and those of its peers.

`benchmarks/serving.py` starts them. A peer runs in its own environment, without this project, so
that each has the versions and the settings at which it is fastest. A module of this package is one
engine:

- ``make(settings)`` loads the model and returns a `Run`,
- ``PACKAGES`` are installed in its environment, with the variables ``BUILD``, and the ``UNWANTED``
  of what they bring is removed; an engine without ``PACKAGES`` runs in this project's,
- ``VARIANTS`` are its settings by the name in tables; of several, each batch size takes the
  fastest,
- ``convert(exported, out, settings)`` makes its own files from an export for Hugging Face, if it
  needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

PROMPT = NEW = 64
"""Tokens of a prompt, and new ones."""
TOP_K = 50
VOCABULARY = 50257
ENGINES = ("own", "transformers", "ctranslate2", "llama_cpp", "openvino", "vllm")

Run = Callable[[np.ndarray], dict[str, Any]]
"""Prompts (batch, `PROMPT`) → seconds until each has `NEW` tokens, and further results."""
