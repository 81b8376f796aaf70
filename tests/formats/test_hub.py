"""Import by name from a hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from gpt_dist.checkpoints.reader import load_model
from tests import warm
from tests.formats.test_export import exported, make_model, make_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer("bpe")
    return exported(tmp_path_factory.mktemp("good"), make_model(tokenizer), tokenizer)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's API that a download uses. Each directory in ``root`` is a model."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            name, tree, _ = path.removeprefix("/api/models/").partition("/tree/")
            name = name.partition("/revision/")[0]
            files = sorted((self.root / name).glob("*"))
            info: object = {
                "id": name,
                "modelId": name,
                "sha": "c" * 40,
                "siblings": [{"rfilename": file.name} for file in files],
            }
            if tree:
                info = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"}
                    for file in files
                ]
            self.answer(200 if files else 404, json.dumps(info).encode())
            return
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        file = self.root / name / rest.partition("/")[2]
        self.answer(200 if file.is_file() else 404, file.read_bytes() if file.is_file() else b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_import_from_the_hub(tmp_path: Path, good: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(good, models / "someone" / "gpt2-tiny")
    (models / "someone" / "gpt2-tiny" / "onnx.bin").write_bytes(b"not wanted")
    (models / "meta").mkdir()
    (models / "meta" / "llama").mkdir()
    (models / "meta" / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (models / "meta" / "llama" / "model.safetensors").write_bytes(b"x" * 1000)
    handler = type("Handler", (Hub,), {"root": models, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "c"),
    }

    def fetch(name: str) -> subprocess.CompletedProcess[str]:
        return warm.run_ranks(
            "gpt_dist.import_hf",
            [name, "--out", str(tmp_path / "out")],
            env=os.environ | cache | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        )

    try:
        found = fetch("someone/gpt2-tiny")
        assert found.returncode == 0, found.stderr
        ours, _, _ = load_model(tmp_path / "out")
        theirs, _, _ = load_model(good)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)
        assert not any("onnx" in line for line in handler.asked)
        shutil.rmtree(tmp_path / "out")
        other = fetch("meta/llama")
        assert other.returncode == 2
        assert other.stderr.startswith("error: meta/llama: model_type is 'llama'; valid are")
        assert not any("llama/resolve/main/model.safetensors" in line for line in handler.asked)
        nobody = fetch("nobody/nothing")
        assert nobody.returncode == 1
        assert nobody.stderr == (
            "error: nobody/nothing: no such directory, and no such model on the hub\n"
        )
        assert not (tmp_path / "out").exists()
    finally:
        server.shutdown()
    server.server_close()
    again = fetch("someone/gpt2-tiny")  # the network is gone, but the hub's cache has it
    assert again.returncode == 0, again.stderr
