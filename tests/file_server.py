"""A small web server for download tests: byte ranges, a hub's API with commits, and failures."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

HEAD = "a" * 40


@dataclass
class FileServer:
    """Serves ``root``; the files under ``datasets/OWNER/NAME/`` also as data sets of a hub."""

    root: Path
    url: str = ""
    head: str = HEAD
    """The commit that the branch main is at."""
    commits: dict[str, Path] = field(default_factory=dict)
    """Where else than in ``root`` the files of a commit are."""
    extra_paths: list[str] = field(default_factory=list)
    """Names that the hub lists besides those of its files."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range header of each request for a file."""
    authorizations: set[str | None] = field(default_factory=set)
    """What came as the Authorization header."""
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the next replies break off, one entry each."""
    errors: list[int] = field(default_factory=list)
    """Statuses of the next replies."""
    ranges: bool = True
    """Whether byte ranges are understood."""
    slow: float = 0.0
    """Seconds of pause after each 64 KB."""
    hold_after: int | None = None
    """Bytes after which the next replies stop until ``release`` is set."""
    release: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve(root: Path) -> Iterator[FileServer]:
    """Serve a directory on a free port until the block ends."""
    state = FileServer(root)

    def commit(revision: str) -> str:
        return state.head if revision in ("main", "refs/convert/parquet") else revision

    def files(folder: Path) -> list[Path]:
        return [file for file in sorted(folder.rglob("*")) if file.is_file()]

    def entry(file: Path, repository: Path) -> dict[str, object]:
        path = str(file.relative_to(repository))
        if file.is_dir():
            return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        size, digest = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
        lfs = {"oid": digest, "size": size, "pointerSize": 134}
        return {"type": "file", "path": path, "size": size, "oid": "0" * 40, "lfs": lfs}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            state.authorizations.add(self.headers.get("Authorization"))
            path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
            if path.startswith("/api/datasets/"):
                self.api(path)
            elif hub := re.fullmatch(r"(/datasets/[^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
                self.file(f"{hub[1]}/{hub[3]}", commit(hub[2]))
            else:
                asked = f"{path}?{query}"
                self.file(asked if (state.root / asked.lstrip("/")).exists() else path)

        def do_POST(self) -> None:
            self.do_GET()

        def api(self, path: str) -> None:
            owner, name, *rest = path.removeprefix("/api/datasets/").split("/")
            kind, revision = (*rest, "", "main")[:2] if len(rest) > 1 else ("", "main")
            at = commit(revision)
            repository = state.commits.get(at, state.root) / "datasets" / owner / name
            folder = repository / "/".join(rest[2:])
            if at == state.head or at in state.commits:
                if kind in ("", "revision") and repository.is_dir():
                    names = [str(file.relative_to(repository)) for file in files(repository)]
                    siblings = [{"rfilename": name} for name in names]
                    self.json({"id": f"{owner}/{name}", "sha": at, "siblings": siblings})
                    return
                if kind == "tree" and folder.is_dir():
                    deep = "recursive=true" in self.path.lower()
                    found = files(folder) if deep else sorted(folder.iterdir())
                    entries = [entry(file, repository) for file in found]
                    extra = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40}
                             for path in state.extra_paths]  # fmt: skip
                    self.json([*entries, *extra])
                    return
                if kind == "paths-info":
                    body = self.rfile.read(int(self.headers["Content-Length"]))
                    wanted = [
                        repository / path for path in parse_qs(body.decode()).get("paths", [])
                    ]
                    self.json([entry(file, repository) for file in wanted if file.exists()])
                    return
            self.missing("EntryNotFound")

        def missing(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def json(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def file(self, path: str, at: str | None = None) -> None:
            wanted = self.headers.get("Range") if state.ranges else None
            if self.command != "HEAD":
                state.requests.append((path, wanted))
            if state.errors:
                self.send_error(state.errors.pop(0))
                return
            file = state.commits.get(at or "", state.root) / path.lstrip("/")
            if not file.is_file():
                self.missing("EntryNotFound")
                return
            data = file.read_bytes()
            etag = f'"{hashlib.md5(data).hexdigest()}"'
            if self.headers.get("If-Range", etag) != etag:
                wanted = None
            first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
            start, data = int(first), data[: int(last) + 1] if last else data
            if start >= len(data) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(data) - start))
            if at:
                self.send_header("X-Repo-Commit", at)
            self.end_headers()
            if self.command == "HEAD":
                return
            end = start + state.cut_after.pop(0) if state.cut_after else len(data)
            for begin in range(start, min(end, len(data)), 1 << 16):
                self.wfile.write(data[begin : min(begin + (1 << 16), end)])
                self.wfile.flush()
                if state.slow:
                    threading.Event().wait(state.slow)
                if state.hold_after is not None and begin - start + (1 << 16) >= state.hold_after:
                    state.release.wait(600)
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
