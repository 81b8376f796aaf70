"""The most expensive kernels of a profile."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COUNT = 20
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def busiest(trace: Path) -> list[dict[str, Any]]:
    """The kernels of a Chrome trace that took longest together; without a GPU its operators.

    Returns:
        For each of them ``name``, ``ms`` in all, ``calls`` and ``share`` of the time of all.
    """
    events = json.loads(trace.read_text())["traceEvents"]
    timed = [event for event in events if "dur" in event]
    chosen = [event for event in timed if event.get("cat") in ON_GPU]
    chosen = chosen or [event for event in timed if event.get("cat") == "cpu_op"]
    total: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in chosen:
        total[event["name"]] += event["dur"] / 1e3
        calls[event["name"]] += 1
    whole = sum(total.values()) or 1.0
    first = sorted(total, key=total.__getitem__, reverse=True)[:COUNT]
    return [
        {"name": name, "ms": total[name], "calls": calls[name], "share": total[name] / whole}
        for name in first
    ]


def profiled(work: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """The most expensive kernels of some work."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return busiest(trace)


def show(kernels: list[dict[str, Any]], title: str) -> None:
    """Print them as a table."""
    print(f"{title}: the {len(kernels)} most expensive kernels")
    for kernel in kernels:
        print(
            f"  {kernel['share']:6.1%} {kernel['ms']:10.3f} ms {kernel['calls']:7d} × "
            f"{kernel['name'][:90]}"
        )
