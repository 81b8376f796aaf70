"""A torchrun agent that does not notice its worker's end is killed; one that does is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_dist.parallel import watchdog

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

AGENT = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-S", "-c", {worker!r}])
print(worker.pid, flush=True)
if {reaps}:
    worker.wait()
sys.stdin.read()
"""


def watch(worker: str, *, reaps: bool, patience: float) -> tuple[int | None, str]:
    """Start an agent with a worker, watch both; the agent's exit status and what was said."""
    script = AGENT.format(worker=worker, reaps=reaps)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", script], stdin=-1, stdout=-1, text=True
    ) as agent:
        assert agent.stdout is not None
        assert agent.stdin is not None
        pid = int(agent.stdout.readline())
        command = [sys.executable, "-I", "-S", watchdog.__file__, "watch", str(agent.pid), str(pid)]
        done = subprocess.run(
            [*command, str(patience)], capture_output=True, text=True, timeout=120, check=True
        )
        if not done.stderr:
            assert agent.poll() is None
            agent.stdin.close()
        return agent.wait(120), done.stderr


def test_an_agent_that_is_stuck_is_killed() -> None:
    status, said = watch("pass", reaps=False, patience=0.5)
    assert status == -signal.SIGKILL
    assert "is stuck on a dead connection" in said


def test_an_agent_that_noticed_is_left_alone() -> None:
    assert watch("import time; time.sleep(0.5)", reaps=True, patience=120) == (0, "")


def test_a_worker_starts_the_watch_and_ends() -> None:
    """As in a rank: the watch outlives the worker that started it."""
    root = str(Path(watchdog.__file__).parents[2])
    worker = (
        f"import os, sys; sys.path.insert(0, {root!r}); os.environ['TORCHELASTIC_RUN_ID'] = 'x'; "
        "from gpt_dist.parallel.watchdog import watch_agent; watch_agent(0.5)"
    )
    script = AGENT.format(worker=worker, reaps=False)
    with subprocess.Popen([sys.executable, "-S", "-c", script], stdin=-1, stdout=-1) as agent:
        deadline = time.monotonic() + 120
        while agent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert agent.returncode == -signal.SIGKILL


def test_the_parent_of_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert watchdog.parent_of(child.pid) == os.getpid()
        child.kill()
    assert watchdog.parent_of(child.pid) is None
