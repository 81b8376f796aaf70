"""The fault injector, with the number of faults that fits into CI (`make soak` runs 100)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.slow(120)
def test_two_faults_change_nothing(tmp_path: Path) -> None:
    result = tmp_path / "faults.json"
    command = [sys.executable, str(ROOT / "benchmarks/faults.py"), "--kills", "2"]
    done = subprocess.run(
        [*command, "--json", str(result)], capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text())
    assert sum(found["faults"].values()) == 2
    assert found["recoveries"] >= 1
    assert not found["differences"]
    assert not found["processes_left"]
    assert found["most_steps_lost"] <= found["checkpoint_interval"]
