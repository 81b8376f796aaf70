"""Downloads that go on where they stopped and are checked: plain URLs and files of the hub.

A file grows as ``NAME.part`` and gets its name when its size, and its sha256 where the source
states one, are right. (The hub's own client begins anew after a kill, hence this one.)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.files import naming, needing_directory, sync_directory

ATTEMPTS = 6
"""Failures in a row, without a byte between them, before giving up."""
BACKOFF_SECONDS = 1.0
"""Before the second attempt; doubles with each further one."""
TIMEOUT_SECONDS = 60.0
BLOCK_BYTES = 1 << 20

Report = Callable[[str], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        url: where it is.
        name: relative path under which it is kept.
        size: in bytes, where known.
        sha256: where known.
        headers: for the request.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def fetch(self, directory: Path, report: Report = lambda text: None) -> Path:
        """The file on disk, downloaded if need be.

        Args:
            directory: where downloads are kept.
            report: is told now and then how far it is.

        Raises:
            GptDistError: cannot be had, or is not what it should be.
            OSError: naming the file; the disk is full, for example.
        """
        target = directory / self.name
        if target.is_file():
            if self.size is None or target.stat().st_size == self.size:
                return target
            target.unlink()
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

    def _fill(self, file: BufferedRandom, etag_file: Path, report: Report) -> None:
        failures = 0
        while True:
            before = file.seek(0, os.SEEK_END)
            try:
                self._transfer(file, etag_file, report)
                break
            except _Interrupted as error:
                failures = 1 if file.seek(0, os.SEEK_END) > before else failures + 1
                if failures >= ATTEMPTS:
                    raise GptDistError(
                        f"{self.url}: {error}; run again to go on, or bring the file here and give "
                        "it with --source"
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
        """One request; asks for what is still missing."""
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
            if etag_file.exists():  # begin anew if the file has changed meanwhile
                headers["If-Range"] = etag_file.read_text()
        try:
            with requests.get(
                self.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS
            ) as response:
                status = response.status_code
                if status == 416:  # nothing there after what we have: all of it, or another file
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
                # read1 gives all that came before a connection breaks; iter_content drops some.
                while block := response.raw.read1(BLOCK_BYTES):
                    file.write(block)
                    have += len(block)
                    report(f"fetching {self.name}: {have / 1e6:,.0f} MB" + _of(total_bytes))
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise UsageError(f"{self.url}: {error}") from None
        except urllib3.exceptions.ProtocolError:  # IncompleteRead and its like
            raise _Interrupted(f"connection lost after {have:,} bytes") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _Interrupted(_reason(error)) from None


class _Interrupted(Exception):
    """A failure that may pass."""


def _of(total: int | None) -> str:
    return f" of {total / 1e6:,.0f}" if total else ""


def _reason(error: Exception) -> str:
    """The innermost cause of a network error, on one line."""
    reason: BaseException = error
    for _ in range(5):
        inner = getattr(reason, "reason", None) or (reason.args[0] if reason.args else None)
        if not isinstance(inner, BaseException):
            break
        reason = inner
    return " ".join(str(reason).split()) or type(reason).__name__


def hub_files(
    repository: str, folder: str, endpoint: str | None = None, suffix: str = ".parquet"
) -> list[RemoteFile]:
    """The files of a folder of a data set on the Hugging Face hub, or on a mirror of it.

    Args:
        repository: such as ``HuggingFaceFW/fineweb-edu``.
        folder: inside the repository, "" for its root.
        endpoint: address of the mirror; None = the hub (or ``HF_ENDPOINT``).

    Raises:
        GptDistError: no such data set or folder, or no connection.
    """
    from huggingface_hub import HfApi, RepoFile, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=endpoint)
    where = f"{api.endpoint}/datasets/{repository}" + (f"/{folder}" if folder else "")
    try:
        entries = list(
            api.list_repo_tree(repository, folder or None, recursive=True, repo_type="dataset")
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise GptDistError(f"{where}: HTTP {status}; is there such a data set?") from None
    except Exception as error:  # of the HTTP client, which differs between the library's versions
        raise GptDistError(
            f"{where}: no connection ({_reason(error)}); on a machine without internet give the "
            "files with --source DIR"
        ) from None
    token = get_token()
    headers = (("Authorization", f"Bearer {token}"),) if token else ()
    files = [
        RemoteFile(
            hf_hub_url(repository, entry.path, repo_type="dataset", endpoint=endpoint),
            f"{repository.rpartition('/')[2]}/{entry.path}",
            entry.size,
            entry.lfs.sha256 if entry.lfs else None,
            headers,
        )
        for entry in entries
        if isinstance(entry, RepoFile) and entry.path.endswith(suffix)
    ]
    if not files:
        raise GptDistError(f"{where}: no {suffix} files there")
    return sorted(files, key=lambda file: file.name)
