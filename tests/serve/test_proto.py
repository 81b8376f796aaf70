"""The .proto files: the committed stubs match them, and they keep what was frozen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import node_package

ROOT = Path(__file__).parents[2]
FROZEN = ROOT / "frozen-proto/v1"


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


def breaking(buf: Path, directory: Path) -> str:
    """What `buf breaking` finds in a copy of the API, against the frozen one."""
    command = [buf, "breaking", "--against", FROZEN]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert not done.stderr
    assert bool(done.returncode) == bool(done.stdout)
    return done.stdout


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A directory with a copy of the API that a test may change."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


@pytest.mark.node
@pytest.mark.slow
def test_the_api_keeps_what_was_frozen(buf: Path, copied: Path) -> None:
    assert breaking(buf, copied) == ""


@pytest.mark.node
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "before", "after", "complaint"),
    [
        ("generation", "optional uint32 top_k = 2", "optional uint64 top_k = 2", "top_k"),
        ("generation", "optional uint32 top_k = 2", "optional uint32 top_n = 2", "top_k"),
        ("generation", "FINISH_REASON_LENGTH = 1;", "FINISH_REASON_LENGTH = 9;", "FinishReason"),
        ("errors", "ERROR_REASON_QUEUE_FULL = 10", "ERROR_REASON_BUSY = 10", "QUEUE_FULL"),
        ("generation_service", "string model = 5;", "", '"5" with name "model"'),
        ("generation_service", "returns (stream GenerateBatch", "returns (GenerateBatch", "server"),
        ("model_service", "rpc GetServerStatus(", "rpc GetStatus(", "GetServerStatus"),
    ],
)
def test_a_breaking_change_fails(
    buf: Path, copied: Path, file: str, before: str, after: str, complaint: str
) -> None:
    path = copied / f"proto/gpt_dist/v1/{file}.proto"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert complaint in breaking(buf, copied)


@pytest.mark.node
@pytest.mark.slow
def test_an_extension_passes(buf: Path, copied: Path) -> None:
    path = copied / "proto/gpt_dist/v1/generation.proto"
    extended = "  // New.\n  optional uint32 new_option = 99;\n}\n\n// When a continuation ends"
    text = path.read_text()
    assert "}\n\n// When a continuation ends" in text
    path.write_text(text.replace("}\n\n// When a continuation ends", extended, 1))
    assert breaking(buf, copied) == ""
