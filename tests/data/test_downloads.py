"""Downloads from a local server: they resume after failures and kills, and are verified."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_dist.data.preparation import downloads, hub
from gpt_dist.data.preparation.downloads import RemoteFile
from gpt_dist.data.preparation.hub import hub_files, resolve_commit
from gpt_dist.errors import GptDistError
from tests.file_server import HEAD, FileServer, serve

DATA = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(downloads, "BACKOFF_SECONDS", 0.01)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "file.bin").write_bytes(DATA)
    with serve(tmp_path / "web") as running:
        yield running


def remote(server: FileServer, name: str = "file.bin", **facts: object) -> RemoteFile:
    return RemoteFile(f"{server.url}/{name}", f"host/{name}", **facts)  # type: ignore[arg-type]


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def test_a_download(server: FileServer, tmp_path: Path) -> None:
    said: list[str] = []
    file = remote(server, size=len(DATA), sha256=SHA256)
    path = file.fetch(tmp_path / "d", said.append)
    assert path.read_bytes() == DATA
    assert files(tmp_path / "d") == ["host/file.bin"]
    assert said[-1] == "fetching host/file.bin: 3 MB of 3"
    assert file.fetch(tmp_path / "d") == path
    assert len(server.requests) == 1, "a file that is there is not fetched again"


@pytest.mark.parametrize("facts", [{}, {"size": len(DATA), "sha256": SHA256}])
def test_a_lost_connection_resumes(
    server: FileServer, tmp_path: Path, facts: dict[str, object]
) -> None:
    server.cut_after = [1_000_000, 0, 500_000]
    assert remote(server, **facts).fetch(tmp_path / "d").read_bytes() == DATA
    ranges = [wanted for _, wanted in server.requests]
    assert ranges == [None, "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]
    assert files(tmp_path / "d") == ["host/file.bin"]


def test_passing_failures_are_retried(server: FileServer, tmp_path: Path) -> None:
    server.errors = [503, 429, 500]
    assert remote(server).fetch(tmp_path / "d").read_bytes() == DATA


def test_a_server_without_ranges(server: FileServer, tmp_path: Path) -> None:
    server.ranges = False
    server.cut_after = [1_000_000]
    assert remote(server).fetch(tmp_path / "d").read_bytes() == DATA


def test_a_file_that_changed_since_starts_over(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cut_after = [1_000_000]
    with monkeypatch.context() as patch:
        patch.setattr(downloads, "ATTEMPTS", 1)
        with pytest.raises(GptDistError, match="connection lost after 1,000,000 bytes; run again"):
            remote(server).fetch(tmp_path / "d")
    assert "host/file.bin.part" in files(tmp_path / "d")
    other = DATA[::-1]
    (tmp_path / "web" / "file.bin").write_bytes(other)
    assert remote(server).fetch(tmp_path / "d").read_bytes() == other


def test_a_kill_loses_nothing(server: FileServer, tmp_path: Path) -> None:
    server.hold_after = 1_000_000
    code = (
        "import sys; from pathlib import Path\n"
        "from gpt_dist.data.preparation.downloads import RemoteFile\n"
        "RemoteFile(sys.argv[1], 'host/file.bin').fetch(Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, f"{server.url}/file.bin", str(tmp_path / "d")]
    process = subprocess.Popen(command)
    part = tmp_path / "d" / "host" / "file.bin.part"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not part.exists() or part.stat().st_size < 500_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert 500_000 <= have < len(DATA)
    server.hold_after = None
    server.release.set()
    assert remote(server).fetch(tmp_path / "d").read_bytes() == DATA
    assert server.requests[-1] == ("/file.bin", f"bytes={have}-")


def test_what_is_not_the_file_is_refused(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(GptDistError, match="sha256 differs"):
        remote(server, sha256="0" * 64).fetch(tmp_path / "d")
    with pytest.raises(GptDistError, match="3,000,000 bytes, but 7 were promised"):
        remote(server, size=7).fetch(tmp_path / "d")
    with pytest.raises(GptDistError, match=r"nothing\.bin: HTTP 404"):
        remote(server, "nothing.bin").fetch(tmp_path / "d")
    server.errors = [503] * 20
    with pytest.raises(GptDistError, match=r"file\.bin: HTTP 503 .*; run again to resume"):
        remote(server).fetch(tmp_path / "d")
    assert not (tmp_path / "d" / "host" / "file.bin").exists()


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "BACKOFF_SECONDS", 0.01)
    with pytest.raises(GptDistError, match=r"127\.0\.0\.1:9/x: .*[Rr]efused.*; run again"):
        RemoteFile("http://127.0.0.1:9/x", "x").fetch(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client retries
    with pytest.raises(GptDistError, match=r"no connection .*give the files with --source DIR"):
        hub_files("owner/name", "", HEAD, "http://127.0.0.1:9")


def test_a_mirror_of_the_hub(server: FileServer, tmp_path: Path) -> None:
    folder = tmp_path / "web" / "datasets" / "owner" / "name" / "sample" / "10BT"
    folder.mkdir(parents=True)
    for name in ("001.parquet", "000.parquet", "README.md"):
        (folder / name).write_bytes(name.encode() * 1000)
    assert resolve_commit("owner/name", None, server.url) == HEAD
    found = hub_files("owner/name", "sample/10BT", HEAD, server.url)
    assert [file.name for file in found] == [
        "name/sample/10BT/000.parquet",
        "name/sample/10BT/001.parquet",
    ]
    server.cut_after = [5000]
    path = found[0].fetch(tmp_path / "d")
    assert path.read_bytes() == b"000.parquet" * 1000
    assert path == tmp_path / "d" / "name" / "sample" / "10BT" / "000.parquet"
    assert server.requests[1][1] == "bytes=5000-"
    with pytest.raises(GptDistError, match=r"owner/name/nothing: HTTP 404; is there such a data"):
        hub_files("owner/name", "nothing", HEAD, server.url)
    with pytest.raises(GptDistError, match=r"no \.txt files there"):
        hub_files("owner/name", "sample", HEAD, server.url, ".txt")


def test_a_file_of_another_commit_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    """Name and size are the same; the checksum is not."""
    remote(server, size=len(DATA), sha256=SHA256).fetch(tmp_path / "d")
    other = DATA[::-1]
    (tmp_path / "web" / "file.bin").write_bytes(other)
    changed = remote(server, size=len(DATA), sha256=hashlib.sha256(other).hexdigest())
    assert changed.fetch(tmp_path / "d").read_bytes() == other


UNSAFE = ["../x.parquet", "a/../../x.parquet", "a\\..\\x.parquet", "/etc/x.parquet"]
UNSAFE += ["\\\\host\\x.parquet", "C:\\x.parquet", "c:x.parquet", "x\0.parquet"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_are_refused(name: str, server: FileServer, tmp_path: Path) -> None:
    """In a URL and in the list of a mirror."""
    with pytest.raises(GptDistError, match=r"not a safe file name: '.*parquet'") as caught:
        RemoteFile(f"{server.url}/x", name)
    assert "\n" not in str(caught.value)
    (tmp_path / "web" / "datasets" / "owner" / "name").mkdir(parents=True)
    server.extra_paths = [name]
    with pytest.raises(GptDistError, match="datasets/owner/name: not a safe file name: "):
        hub_files("owner/name", "", HEAD, server.url)


def test_the_users_token_goes_to_the_users_hub_only(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "web" / "datasets" / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "x.parquet").write_bytes(b"x")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def ask() -> set[str | None]:
        server.authorizations.clear()
        commit = resolve_commit("owner/name", None, server.url)
        (file,) = hub_files("owner/name", "", commit, server.url)
        file.fetch(tmp_path / "d")
        (tmp_path / "d" / "name" / "x.parquet").unlink()
        return server.authorizations

    assert ask() == {None}
    monkeypatch.setattr(hub, "OWN_ENDPOINT", server.url + "/")
    assert ask() == {"Bearer hf_secret"}
    for other in ("https" + server.url[4:], server.url + "0", "http://localhost"):
        monkeypatch.setattr(hub, "OWN_ENDPOINT", other)
        assert ask() == {None}


@pytest.mark.slow(2)
def test_two_processes_fetch_once(server: FileServer, tmp_path: Path) -> None:
    server.slow = 0.01
    code = (
        "import sys; from pathlib import Path\n"
        "from gpt_dist.data.preparation.downloads import RemoteFile\n"
        "path = RemoteFile(sys.argv[1], 'host/file.bin').fetch(Path(sys.argv[2]))\n"
        "import hashlib; print(hashlib.sha256(path.read_bytes()).hexdigest())"
    )
    command = [sys.executable, "-c", code, f"{server.url}/file.bin", str(tmp_path / "d")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {process.communicate(timeout=60)[0].strip() for process in both} == {SHA256}
    assert len(server.requests) == 1
    assert os.listdir(tmp_path / "d" / "host") == ["file.bin"]  # noqa: PTH208
