"""What a failing command prints, and where it still says more."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from gpt_dist import errors
from gpt_dist.errors import GptDistError, UsageError, run_main
from gpt_dist.parallel import watchdog
from gpt_dist.parallel.world import World

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def read_settings_of(path: Path) -> None:
    path.read_text()


def fail(main: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and standard error of a command."""
    with pytest.raises(SystemExit) as ended:
        run_main(main)  # type: ignore[arg-type]
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("collective", [False, True])
def test_a_traceback_on_request(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    collective: bool,
) -> None:
    def main() -> None:
        path = tmp_path / "none"
        if collective:
            ALONE.together(lambda: read_settings_of(path))
        else:
            read_settings_of(path)

    line = f"error: No such file or directory: {tmp_path}/none\n"
    for off in ("0", ""):
        monkeypatch.setenv("GPT_DIST_TRACEBACK", off)
        assert fail(main, capsys) == (1, line)
    monkeypatch.delenv("GPT_DIST_TRACEBACK")
    assert fail(main, capsys) == (1, line)
    monkeypatch.setenv("GPT_DIST_TRACEBACK", "1")
    status, text = fail(main, capsys)
    assert status == 1
    assert text.endswith(line)
    assert text.startswith("Traceback")
    assert "in read_settings_of" in text  # where it arose, also where all ranks failed together


def test_other_ranks_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise GptDistError("lost")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("GPT_DIST_TRACEBACK", "1")
    assert fail(main, capsys) == (1, "")


@pytest.mark.parametrize(
    ("rank", "local_rank", "connected", "text"),
    [
        ("0", "0", False, "error: lost\n"),
        ("8", "0", False, f"error on {socket.gethostname()}: lost\n"),
        ("8", "0", True, ""),
        ("9", "1", False, ""),
    ],
)
def test_a_host_without_rank_0_says_what_only_it_may_know(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    local_rank: str,
    connected: bool,
    text: str,
) -> None:
    def main() -> None:
        raise GptDistError("lost")

    variables = {"TORCHELASTIC_RUN_ID": "a", "RANK": rank, "LOCAL_RANK": local_rank}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(errors, "PATIENCE", 0.0)
    monkeypatch.setattr(errors, "connected", lambda: connected)
    monkeypatch.setattr(errors.os, "_exit", sys.exit)
    assert fail(main, capsys) == (1, text)


def test_only_a_usage_error_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    for error in (UsageError("no"), GptDistError("lost")):

        def main(error: Exception = error) -> None:
            raise error

        with pytest.raises(SystemExit):
            run_main(main, on_usage_error=lambda: calls.append(capsys.readouterr().err))
    assert calls == ["error: no\n"]


@pytest.mark.parametrize(
    ("restarts", "local_rank", "agent", "ended"),
    [
        ("3", "0", True, True),
        ("0", "0", True, False),
        ("3", "1", True, False),
        ("3", "0", False, False),
    ],
)
def test_who_ends_the_agent(
    monkeypatch: pytest.MonkeyPatch, restarts: str, local_rank: str, agent: bool, ended: bool
) -> None:
    """One rank a node, only where torchrun would restart it, and only torchrun itself."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(watchdog, "is_agent", lambda _: agent)
    monkeypatch.setattr(watchdog, "AGENT_GRACE", 0.0)
    monkeypatch.setattr(watchdog.os, "kill", lambda *sending: sent.append(sending))
    watchdog.stop_agent()
    assert sent == [(os.getppid(), signal.SIGTERM)] * ended


def test_each_agent_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process names its parent, and a child names this process."""
    command = [
        sys.executable,
        "-c",
        "from gpt_dist.parallel import watchdog as w; print(w.agent_id())",
    ]

    def of_a_child() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert watchdog.agent_id() == of_a_child() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run-1")
    assert of_a_child() == of_a_child() != watchdog.agent_id()
    host, process, started = of_a_child().rsplit(":", 2)
    assert (host, process) == (socket.gethostname(), str(os.getpid()))
    if sys.platform == "linux":
        ticks = psutil.Process().create_time() - psutil.boot_time()
        assert int(started) / os.sysconf("SC_CLK_TCK") == pytest.approx(ticks, abs=2)
