"""A real Slurm cluster and two networked hosts, started for the first test that needs them."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import SlurmCluster, missing_programs
from tests.cluster.two_hosts import TwoHosts, obstacle
from tests.components import missing
from tests.conftest import BIN

ROOT = Path(__file__).parents[2]
SETUP = "tests/cluster/setup.sh"


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    if programs := missing_programs():
        missing(f"no {', '.join(programs)}; see {SETUP}")
    # Not below pytest's directory: the paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as directory:
        with SlurmCluster(Path(directory)) as cluster:
            cluster.env["PATH"] = f"{BIN}:{cluster.env['PATH']}"
            yield cluster


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    if reason := obstacle():
        missing(f"{reason}; see {SETUP}")
    with TwoHosts() as two:
        yield two


def processes_with(text: str) -> list[str]:
    """Command lines of running processes that contain the text."""
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if text in line]
