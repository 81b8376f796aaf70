"""Write a measurement with its command, date, commit, machine and versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
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


def commit() -> str:
    """The commit of this checkout, with ``+`` if files are modified; without git, $COMMIT."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output(
            [*git, "status", "--porcelain", "--", "../gpt_dist", "../serve", "."], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "")
    results = ("results/", "LOG.md")
    return name + "+" * any(not any(r in line for r in results) for line in changed.splitlines())


def command() -> str:
    """What was typed to start this benchmark."""
    return shlex.join(["python", *sys.argv])


def version_in(python: str, package: str) -> str:
    """The version of a package that another interpreter would import."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def record(
    path: str | None,
    results: dict[str, Any],
    packages: tuple[str, ...] = (),
    peers: dict[str, str] | None = None,
) -> None:
    """Write a benchmark's results as JSON, if a file was asked for.

    Args:
        path: the file; None = write nothing.
        results: what was measured.
        packages: packages whose versions to record, beside torch.
        peers: package → version, of other environments.
    """
    if not path:
        return
    document = {
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", *packages)}
        | (peers or {}),
        **results,
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")
