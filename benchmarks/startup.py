"""Start-up times: --help, importing torch, the first step of a run and of a resumed run.

    python benchmarks/startup.py --json benchmarks/results/startup.json

Each figure is the wall-clock time of a fresh process, with GPT-2 124M (--config takes another
preset), the files in the page cache and the CPU kernels already compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flags import as_flags, benchmark_parser, prepare_shakespeare
from record import record

from gpt_dist.errors import GptDistError, run_main


def first_row(command: list[str], metrics: Path, log: Path) -> float:
    """Seconds from the command to its first new row of metrics; waits for the process to end."""
    before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    began = time.perf_counter()
    first = 0.0
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if not first and metrics.exists() and metrics.read_bytes().count(b"\n") > before:
                first = time.perf_counter() - began
            time.sleep(0.005)
    if process.returncode:
        raise GptDistError(f"training failed:\n{log.read_text()[-2000:]}")
    return first


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    python = sys.executable
    data, log = directory / "data", directory / "log"
    prepare_shakespeare(data, "gpt2")
    found: dict[str, list[float]] = {
        "help_s": [],
        "import_torch_s": [],
        "command_to_first_step_s": [],
        "resume_to_next_step_s": [],
        "step_s": [],
    }
    for turn in range(arguments.rounds + 1):
        found["help_s"].append(seconds([python, "-m", "gpt_dist.train", "--help"]))
        found["import_torch_s"].append(seconds([python, "-c", "import torch"]))
        out = directory / f"run-{turn}"
        settings = {
            "config": arguments.config,
            "out_dir": out,
            "data.path": data,
            "model.context_length": arguments.context,
            "train.batch_tokens": arguments.tokens,
            "train.micro_batch_size": 4,
            "optim.warmup_steps": 0,
            "optim.schedule": "constant",
            "train.eval_every": 0,
            "train.sample_every": 0,
            "train.checkpoint_every": 0,
        }
        flags = as_flags(settings)
        command = [python, "-m", "gpt_dist.train", *flags, "--train.steps"]
        metrics = out / "metrics.jsonl"
        found["command_to_first_step_s"].append(first_row([*command, "3"], metrics, log))
        found["resume_to_next_step_s"].append(first_row([*command, "4"], metrics, log))
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        found["step_s"].append(statistics.median(row["step_ms"] for row in rows[1:3]) / 1000)
    # The first round only filled the page cache.
    return {
        key: {"median": statistics.median(values[1:]), "runs": values[1:]}
        for key, values in found.items()
    }


def main() -> None:
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("--config", default="gpt2-124m", help="preset (gpt2-124m)")
    parser.add_argument("--context", type=int, default=256, help="context length (256)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per step (1024)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (3)")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    os.environ["CI"] = "1"  # no progress bars
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        result = measure(arguments, Path(name))
    for key, values in result.items():
        print(f"{key:26s} {values['median']:6.2f}")
    record(arguments.json, {"config": arguments.config, "figures": result})


if __name__ == "__main__":
    run_main(main)
