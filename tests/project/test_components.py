"""A missing component fails in CI and skips elsewhere."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.components import require, require_module


def test_what_is_there_is_returned() -> None:
    assert require("no-such-program", "sh") == shutil.which("sh")
    assert require_module("os.path") is os.path


@pytest.mark.parametrize("ci", [True, False])
@pytest.mark.parametrize("need", [require, require_module])
def test_what_is_missing(need: object, ci: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true" if ci else "")
    outcome = pytest.fail.Exception if ci else pytest.skip.Exception
    with pytest.raises(outcome, match="no_such_thing is not installed"):
        need("no_such_thing")  # type: ignore[operator]
