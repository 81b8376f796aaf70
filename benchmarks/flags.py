"""Command lines: a benchmark's own, and those of the commands it starts."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def benchmark_parser(file: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark: its name, and its docstring as it stands."""
    return argparse.ArgumentParser(
        prog=f"benchmarks/{Path(file).name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """``{"optim.lr": 1e-3}`` → ``["--optim.lr", "0.001"]``."""
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def prepare_shakespeare(out: Path, tokenizer: str) -> None:
    """Turn the bundled Shakespeare into token shards in ``out``."""
    command = ["gpt_dist.prepare", "shakespeare", "--tokenizer", tokenizer, "--out", str(out)]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
