"""Rows of ``metrics.jsonl``: one JSON object a line, numbers in full precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def encode_row(row: Row) -> bytes:
    """A row as a line of JSON; numbers that are not finite become null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite).encode() + b"\n"


def whole_lines(path: Path) -> list[Row]:
    """Rows of a ``metrics.jsonl``, without lines that a kill left incomplete."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
