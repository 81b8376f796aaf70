"""Settings that changed their name or their values since an earlier release.

Old configurations stay valid: ``migrate`` is applied to YAML files, to command lines and to the
configurations in checkpoints before they are validated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt_dist.errors import UsageError


@dataclass(frozen=True)
class Migration:
    """One setting, then and now."""

    old: str
    """Dotted key that earlier releases knew."""
    new: str | None
    """Dotted key that replaces it; ``old`` itself where only values changed; None: dropped."""
    convert: Callable[[Any], Any] = lambda value: value
    """Old value → new value. Must leave new values as they are where the key stays the same.
    A value for which it raises TypeError or ValueError is kept, and validation refuses it."""


MIGRATIONS: list[Migration] = []
"""Oldest first: each sees what those before it made of the settings. For example

    Migration("train.max_iters", "train.steps")
    Migration("train.precision", "train.precision", lambda v: "bf16" if v == "bfloat16" else v)
"""


def migrate(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings under the names and with the values of this release.

    Args:
        settings: nested dictionaries as a YAML file or ``state.json`` holds them.

    Returns:
        A migrated copy, and one line for each setting that changed.

    Raises:
        UsageError: a setting is there under its old and its new name.
    """
    settings = copy.deepcopy(settings)
    changes = []
    for migration in MIGRATIONS:
        if not has(settings, migration.old):
            continue
        before = remove(settings, migration.old)
        if migration.new is None:
            changes.append(f"{migration.old} no longer exists and is ignored")
            continue
        try:
            after = migration.convert(before)
        except (TypeError, ValueError):
            after = before
        if has(settings, migration.new):
            raise UsageError(f"{migration.old} is now {migration.new}, and both are set")
        put(settings, migration.new, after)
        if migration.new != migration.old:
            changes.append(f"{migration.old} is now {migration.new}")
        elif after != before:
            changes.append(f"{migration.old} = {before} is now {after}")
    return settings, changes


def former_names() -> dict[str, str | None]:
    """Old name → today's name (None: dropped), for every setting that was renamed."""
    names: dict[str, str | None] = {}
    for migration in MIGRATIONS:
        if migration.new != migration.old:
            later = {old: migration.new for old, new in names.items() if new == migration.old}
            names |= later | {migration.old: migration.new}
    return names


def has(settings: dict[str, Any], key: str) -> bool:
    """Whether a dotted key is set."""
    *sections, name = key.split(".")
    target: Any = settings
    for section in sections:
        target = target.get(section) if isinstance(target, dict) else None
    return isinstance(target, dict) and name in target


def get(settings: dict[str, Any], key: str) -> Any:
    """The value of a dotted key that is set."""
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    return value


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; makes the sections above it."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(settings.get(section), dict):
            settings[section] = {}
        settings = settings[section]
    settings[name] = value


def remove(settings: dict[str, Any], key: str) -> Any:
    """Remove a dotted key that is set, and its section if that is empty now; returns the value."""
    *sections, name = key.split(".")
    section = get(settings, ".".join(sections)) if sections else settings
    value = section.pop(name)
    if sections and not section:
        remove(settings, ".".join(sections))
    return value
