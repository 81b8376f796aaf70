"""A small web server for download tests: byte ranges, a hub's API, and failures on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class FileServer:
    """Serves ``root``; the files under ``datasets/OWNER/NAME/`` also as data sets of a hub."""

    root: Path
    url: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range header of each request for a file."""
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the next replies break off, one entry each."""
    errors: list[int] = field(default_factory=list)
    """Statuses of the next replies."""
    ranges: bool = True
    """Whether byte ranges are understood."""
    slow: float = 0.0
    """Seconds of pause after each 64 KB."""


@contextmanager
def serve(root: Path) -> Iterator[FileServer]:
    """Serve a directory on a free port until the block ends."""
    state = FileServer(root)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/api/datasets/"):
                self.tree(path)
            else:
                self.file(path.replace("/resolve/main/", "/"))

        def tree(self, path: str) -> None:
            owner, name, rest = path.removeprefix("/api/datasets/").split("/", 2)
            repository = state.root / "datasets" / owner / name
            folder = repository / rest.removeprefix("tree/main").strip("/")
            if not folder.is_dir():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            entries = [
                {
                    "type": "file",
                    "path": str(file.relative_to(repository)),
                    "size": file.stat().st_size,
                    "oid": "0" * 40,
                    "lfs": {
                        "oid": hashlib.sha256(file.read_bytes()).hexdigest(),
                        "size": file.stat().st_size,
                        "pointerSize": 134,
                    },
                }
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            ]
            body = json.dumps(entries).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def file(self, path: str) -> None:
            wanted = self.headers.get("Range") if state.ranges else None
            state.requests.append((path, wanted))
            if state.errors:
                self.send_error(state.errors.pop(0))
                return
            file = state.root / path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            data = file.read_bytes()
            etag = f'"{hashlib.md5(data).hexdigest()}"'
            if self.headers.get("If-Range", etag) != etag:
                wanted = None
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
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
            self.end_headers()
            end = start + state.cut_after.pop(0) if state.cut_after else len(data)
            for at in range(start, min(end, len(data)), 1 << 16):
                self.wfile.write(data[at : min(at + (1 << 16), end)])
                self.wfile.flush()
                if state.slow:
                    threading.Event().wait(state.slow)
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
