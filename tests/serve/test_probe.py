"""The container's health check finds the server's port and TLS by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt_dist.errors import GptDistError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from serve.options import PREFIX, Options
from serve.probe import healthy, main, options_of
from tests.conftest import free_port
from tests.serve.conftest import PATIENCE, LiveServer, StartServer
from tests.serve.test_security import Authority

SCRIPT = Path(__file__).parents[2] / "launch/container/health.sh"


def ask(server: LiveServer, **options: Any) -> bool:
    return healthy(Options(Path("x"), port=server.server.port, **options), PATIENCE)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "localhost"])
def test_every_address(start: StartServer, model: GPT, host: str) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"), host=host, allow_insecure=True)
    assert ask(server, host=host)
    server.server.health.set(False)
    assert not ask(server, host=host)


def test_tls_and_client_certificates(
    start: StartServer, model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = Decoder(model, max_slots=1, dtype="fp32")
    ours, theirs = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "theirs", "theirs")
    cert, key = ours.issue("server")
    for ca in (None, ours.path):
        files = {"tls_cert": cert, "tls_key": key, "tls_ca": ca}
        server = start(decoder, **files)
        assert ask(server, **files)
        server.server.health.set(False)
        assert not ask(server, **files)
    assert capsys.readouterr().out == ""
    # The server's own certificate is no client's.
    files["tls_ca"] = theirs.path
    assert ask(start(decoder, **files), **files)
    assert "its health is unknown" in capsys.readouterr().out


def test_nobody_answers() -> None:
    with pytest.raises(GptDistError, match=r"127\.0\.0\.1"):
        healthy(Options(Path("x"), port=free_port()), PATIENCE)
    with pytest.raises(GptDistError, match="give it a fixed port"):
        healthy(Options(Path("x"), port=0), PATIENCE)


@pytest.fixture
def stand_in() -> Any:
    """Start a process whose command line and environment are those of a server."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **environment: str) -> int:
        # A shell keeps the words after its script in its command line.
        words = ["sh", "-c", "sleep 1000 & wait", "python", "-m", "serve", *arguments]
        started.append(subprocess.Popen(words, env=os.environ | environment))
        return started[-1].pid

    yield start
    for process in started:
        subprocess.run(["pkill", "-P", str(process.pid)], check=False)
        process.kill()
        process.wait()


def test_flags_and_environment_of_the_server(
    stand_in: Any, start: StartServer, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}PORT", "1")  # of this process, not of the server
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    port = str(server.server.port)
    flags = stand_in("--checkpoint", "x", "--port", port, GPT_DIST_SERVE_PORT="2")
    environment = stand_in("--checkpoint", "x", GPT_DIST_SERVE_PORT=port)
    for number in (flags, environment):
        assert options_of(number).port == server.server.port
        assert main(["--pid", str(number)]) == 0
    server.server.health.set(False)
    assert main(["--pid", str(flags)]) == 1
    with pytest.raises(GptDistError, match="does not run python -m serve"):
        options_of(os.getpid())


@pytest.mark.slow
def test_the_script(stand_in: Any, start: StartServer, model: GPT) -> None:
    server = start(Decoder(model, max_slots=1, dtype="fp32"))
    number = stand_in("--checkpoint", "x", "--port", str(server.server.port))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    text = SCRIPT.read_text().replace("serve.probe", f"serve.probe --pid {number}")
    done = subprocess.run(
        ["sh", "-c", text], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "SERVING\n"), done.stderr
