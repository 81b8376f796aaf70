"""Downloads that resume after a failure and are verified: plain URLs and files of the hub.

A file grows as ``NAME.part``. It gets its name when its size is right and, where the source states
one, its sha256. (The hub's own client starts over after a kill, hence this one.)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.files import file_sha256, naming, needing_directory, sync_directory

ATTEMPTS = 6
"""Failures in a row, without a byte received between them, before giving up."""
BACKOFF_SECONDS = 1.0
"""Pause before the second attempt; it doubles with each further one."""
TIMEOUT_SECONDS = 60.0
BLOCK_BYTES = 1 << 20

Report = Callable[[str], None]


def check_name(name: str, origin: str) -> None:
    """Refuse a relative path that could lead out of the directory it is joined to.

    Raises:
        GptDistError: naming ``origin``, which gave the name.
    """
    parts = re.split(r"[/\\]", name)
    drive = any(re.match("[A-Za-z]:", part) for part in parts)
    if not parts[0] or ".." in parts or drive or "\0" in name:
        raise GptDistError(f"{origin}: not a safe file name: {name!r}")


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        url: where it is.
        name: relative path under which it is kept.
        size: in bytes, where known.
        sha256: where known.
        headers: for the request.

    Raises:
        GptDistError: the name would lead out of the directory for downloads.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name, self.url)

    def fetch(self, directory: Path, report: Report = lambda text: None) -> Path:
        """The file on disk, downloaded unless it is there.

        Args:
            directory: where downloads are kept.
            report: is called now and then with a line on the progress.

        Raises:
            GptDistError: the download failed, or the file is not the expected one.
            OSError: with the file's name; the disk is full, for example.
        """
        target = directory / self.name
        if target.is_file():
            if self._is(target):
                return target
            target.unlink()  # of another commit
        part = target.with_name(target.name + ".part")
        with needing_directory(target.parent), naming(part), part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may fetch the same file
            try:
                if not target.is_file():  # the other one has not
                    self._fill(file, target.with_name(target.name + ".etag"), report)
                    file.flush()
                    os.fsync(file.fileno())
                    part.replace(target)
                    sync_directory(target.parent)
            finally:
                if part.exists() and not part.stat().st_size:
                    part.unlink()
        return target

    def _is(self, path: Path) -> bool:
        if self.size is not None and path.stat().st_size != self.size:
            return False
        return self.sha256 is None or file_sha256(path) == self.sha256

    def _fill(self, file: BufferedRandom, etag_file: Path, report: Report) -> None:
        failures, reached = 0, False
        while True:
            before = file.seek(0, os.SEEK_END)
            try:
                self._transfer(file, etag_file, report)
                break
            except _Interrupted as error:
                failures = 1 if file.seek(0, os.SEEK_END) > before else failures + 1
                reached = reached or not isinstance(error, _Unreachable)
                if failures >= ATTEMPTS or not reached:
                    raise GptDistError(
                        f"{self.url}: {error}; run again to resume, or copy the file here and "
                        "name it with --source"
                    ) from None
                pause = BACKOFF_SECONDS * 2 ** (failures - 1)
                report(f"{self.name}: {error}; trying again in {pause:.0f} s")
                time.sleep(pause)
        file.seek(0)
        if self.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
            file.truncate(0)
            raise GptDistError(f"{self.url}: not the expected file (sha256 differs)")
        etag_file.unlink(missing_ok=True)

    def _transfer(self, file: BufferedRandom, etag_file: Path, report: Report) -> None:
        """One request for the missing part."""
        import requests
        import urllib3

        have = file.seek(0, os.SEEK_END)
        if self.size is not None and have >= self.size:
            if have == self.size:
                return
            have = file.truncate(0)
        headers = dict(self.headers) | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if etag_file.exists():  # start over if the file has changed since
                headers["If-Range"] = etag_file.read_text()
        try:
            with requests.get(
                self.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS
            ) as response:
                status = response.status_code
                if status == 416:  # nothing after what we have: it is complete, or another file
                    total = response.headers.get("Content-Range", "").rpartition("/")[2]
                    if total == str(have):
                        return
                    file.truncate(0)
                    raise _Interrupted("the server has another file than before")
                if status in (408, 425, 429) or status >= 500:
                    raise _Interrupted(f"HTTP {status} {response.reason}")
                if status not in (200, 206):
                    raise GptDistError(f"{self.url}: HTTP {status} {response.reason}")
                resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                if status == 200 or not resumed:
                    have = file.truncate(0)
                    if status == 206:
                        raise _Interrupted("the server sent another part than asked for")
                length = response.headers.get("Content-Length")
                total_bytes = have + int(length) if length else self.size
                if self.size is not None and total_bytes != self.size:
                    raise GptDistError(
                        f"{self.url}: {total_bytes:,} bytes, but {self.size:,} were promised"
                    )
                if etag := response.headers.get("ETag"):
                    etag_file.write_text(etag)
                # read1 returns all bytes that came before a failure; iter_content drops some.
                while block := response.raw.read1(BLOCK_BYTES):
                    file.write(block)
                    have += len(block)
                    report(f"fetching {self.name}: {have / 1e6:,.0f} MB" + _of(total_bytes))
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise UsageError(f"{self.url}: {error}") from None
        except urllib3.exceptions.ProtocolError:  # IncompleteRead and its like
            raise _Interrupted(f"connection lost after {have:,} bytes") from None
        except requests.ConnectionError as error:
            raise _Unreachable(network_reason(error)) from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _Interrupted(network_reason(error)) from None


class _Interrupted(Exception):
    """A failure that another attempt may overcome."""


class _Unreachable(_Interrupted):
    """No connection; without an earlier one, other attempts would only cost time."""


def _of(total: int | None) -> str:
    return f" of {total / 1e6:,.0f}" if total else ""


def network_reason(error: Exception) -> str:
    """The innermost cause of a network error, on one line."""
    reason: BaseException = error
    for _ in range(5):
        inner = getattr(reason, "reason", None) or (reason.args[0] if reason.args else None)
        if not isinstance(inner, BaseException):
            break
        reason = inner
    return " ".join(str(reason).split()) or type(reason).__name__
