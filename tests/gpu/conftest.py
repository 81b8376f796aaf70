"""Triton, and what its interpreter found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.components import require_module

Found = dict[str, dict[str, float]]


@pytest.fixture(autouse=True, scope="session")
def _triton() -> None:
    require_module("triton")


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every kernel in Triton's interpreter: case → measure → value.

    One of pytest's workers runs it for all.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / "interpreted.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(interpret())
    found: Found = json.loads(file.read_text())
    return found


def interpret() -> str:
    """What ``interpreted.py`` prints."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.interpreted"],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
