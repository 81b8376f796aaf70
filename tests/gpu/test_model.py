"""The cost model says what the page shows, and holds for what is published."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_model

    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for table in (gpu_model.training_table(), gpu_model.decoding_table()):
        assert table in page, table
    computed = gpu_model.LLMC.speed(gpu_model.H100)
    assert abs(computed / gpu_model.PUBLISHED - 1) < 0.15
    assert f"{computed / 1e3:.0f},000 tokens/s" in page
    sys.modules.pop("gpu_model")
