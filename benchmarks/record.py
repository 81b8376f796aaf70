"""What every measurement is recorded with: command, date, versions, machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> str:
    """Cores, processor and memory, such as ``2-core AMD EPYC (AVX-512 BF16), 24 GB``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{os.cpu_count()}-core {platform.processor() or platform.machine()}"
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    features = facts.get("flags", "").split()
    extra = " (AVX-512 BF16)" if "avx512_bf16" in features else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    name = facts.get("model name", platform.machine()).removesuffix(" Processor")
    return f"{os.cpu_count()}-core {name}{extra}, {memory:.0f} GB"


def record(path: str | None, results: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Write a benchmark's results as JSON, where a file was asked for."""
    if not path:
        return
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", *packages)},
        **results,
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")
