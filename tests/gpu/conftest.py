"""Triton, and what its interpreter found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.components import require_module

Found = dict[str, dict[str, float]]


@pytest.fixture(autouse=True, scope="session")
def _triton() -> None:
    require_module("triton")


@pytest.fixture(scope="session")
def interpreted() -> Found:
    """Every kernel in Triton's interpreter: case → measure → value."""
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
    found: Found = json.loads(done.stdout)
    return found
