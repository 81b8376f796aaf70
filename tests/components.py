"""Programs and packages that some tests need and not every machine has.

With ``CI`` set, a missing component fails the test: there everything is installed. Elsewhere the
test is skipped, with the reason.
"""

from __future__ import annotations

import importlib
import os
import shutil
from typing import Any, NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Fail the calling test in CI; skip it elsewhere. At module level the whole file is meant."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require(program: str, *alternatives: str) -> str:
    """Return the path of a program; the first name that is found in PATH wins."""
    for name in (program, *alternatives):
        if path := shutil.which(name):
            return path
    missing(f"{' or '.join((program, *alternatives))} is not installed")


def require_module(name: str, reason: str | None = None) -> Any:
    """Import and return a module that is not among the package's own dependencies."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        missing(reason or f"the package {name} is not installed")


class Later:
    """A module that is imported when it is first used: some take seconds, in every worker."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(require_module(self._name), attribute)
