"""The .proto files: the committed stubs match them, and they pass buf."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import node_package

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_committed_stubs_match_the_proto_files(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([ROOT / "proto/generate.sh", tmp_path], check=True, env=environment)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*")}
    kept = {
        path.relative_to(ROOT)
        for package in ("gpt_dist/v1", "serve/inference")
        for path in (ROOT / package).glob("*_pb2*")
    }
    assert made == kept
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"run make proto: {path}"


@pytest.fixture(scope="module")
def buf() -> Path:
    """The version of buf that examples/node pins."""
    return node_package("@bufbuild/buf").parents[1] / ".bin/buf"


@pytest.mark.node
@pytest.mark.slow
def test_buf_lint(buf: Path) -> None:
    subprocess.run([buf, "lint"], cwd=ROOT, check=True)


@pytest.mark.node
@pytest.mark.slow
def test_buf_breaking(buf: Path, tmp_path: Path) -> None:
    """The committed API may be extended but not changed, and the check notices a change."""
    for name in ("proto", "buf.yaml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    against = f"{ROOT}/.git#ref=HEAD"
    command = [buf, "breaking", "--against", against]
    kept = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    path = tmp_path / "proto/gpt_dist/v1/generation.proto"
    path.write_text(path.read_text().replace("uint32 top_k = 2", "uint64 top_k = 2"))
    changed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert changed.returncode != 0
    assert "top_k" in changed.stdout
