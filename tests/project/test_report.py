"""docs/performance.md shows what the records say, and an incomplete record is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD: dict[str, Any] = {
    "command": "python benchmarks/scaling.py",
    "machine": "2-core processor, 24 GB",
    "date": "2026-01-31",
    "commit": "0123abc",
    "versions": {"python": "3.12.0", "torch": "2.13.0"},
    "table": [
        {"ranks": 1, "tokens_per_second": 500.0, "speed_up": 1.0},
        {"ranks": 2, "tokens_per_second": 950.0, "speed_up": 1.9},
    ],
}


def report(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/report.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_page_is_up_to_date() -> None:
    done = report("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_figure_says_where_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "scaling.json").write_text(json.dumps(RECORD))
    done = report("--results", tmp_path, "--out", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert "| 2 | 950 | 1.900 |" in page
    for part in ("python benchmarks/scaling.py", "2-core processor", "2026-01-31", "0123abc"):
        assert part in page
    assert "torch 2.13.0" in page


@pytest.mark.parametrize("key", ["command", "machine", "date", "commit", "versions"])
def test_a_record_without_its_origin_is_refused(tmp_path: Path, key: str) -> None:
    record = {name: value for name, value in RECORD.items() if name != key}
    (tmp_path / "scaling.json").write_text(json.dumps(record))
    done = report("--results", tmp_path, "--out", tmp_path / "page.md")
    assert done.returncode == 1
    assert "scaling.json" in done.stderr
    assert key in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "page.md").exists()


def test_a_comparison_without_the_peers_versions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps(RECORD | {"results": []}))
    done = report("--results", tmp_path, "--out", tmp_path / "page.md")
    assert done.returncode == 1
    assert "lacks the version of transformers" in done.stderr


def test_a_file_of_unknown_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(RECORD))
    done = report("--results", tmp_path, "--out", tmp_path / "page.md")
    assert done.returncode == 1
    assert "other.json" in done.stderr
