"""Run ``python -m MODULE …`` in processes of their own that need not import torch first.

A fork server imports the heavy libraries once; every command is a fork of it. This saves the
seconds that each start-up costs, and nothing else is shared.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

PRELOAD = [
    "torch",
    "numpy",
    "safetensors.torch",
    "gpt_dist.training.trainer",
    "gpt_dist.inference.decoder",
]


def _run(module: str, arguments: list[str], cwd: str, log: str, search: list[str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(cwd)
    os.environ["PYTHONPATH"] = os.pathsep.join(search)
    sys.path[:0] = [cwd, *search]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run(
    module: str, arguments: list[str], cwd: Path, log: Path, timeout: float = 240
) -> tuple[int | None, str]:
    """Exit status (None: timed out) and all output of a command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    root = str(Path(__file__).resolve().parents[1])
    process = context.Process(target=_run, args=(module, arguments, str(cwd), str(log), [root]))
    process.start()
    process.join(timeout)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    return status, log.read_text(encoding="utf-8", errors="replace")
