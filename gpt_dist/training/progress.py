"""Where a run stands: what a checkpoint remembers besides tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass
class Progress:
    """A run's position. ``state.json`` holds these fields under these names."""

    step: int = 0
    """Optimizer steps done."""
    sequences: int = 0
    """Sequences consumed."""
    evaluated: int = -1
    """Last step at which the model was scored (validation loss, HellaSwag)."""
    sampled: int = -1
    """Last step at which a sample was written."""
    best_loss: float | None = None
    """Validation loss of the best checkpoint so far, in nats per token."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The position in a checkpoint's ``state.json``.

        Raises:
            KeyError: the checkpoint is not one of a training run.
        """
        return cls(**{field.name: state[field.name] for field in fields(cls)})
