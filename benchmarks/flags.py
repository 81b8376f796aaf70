"""Settings of a training run as its command line."""

from __future__ import annotations

from collections.abc import Mapping


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """``{"optim.lr": 1e-3}`` → ``["--optim.lr", "0.001"]``."""
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]
