"""The cost of checkpoints: the time that saving adds to training, as a share of the steps.

    python benchmarks/checkpoint.py --json benchmarks/results/checkpoint.json

Trains GPT-2 124M with DDP on two ranks, 8,192 tokens per step, and notes when each row of
metrics.jsonl appears. The cost of a checkpoint is the wall-clock time it adds: training waits for
the copy to host memory, and steps are slower while a thread hashes and writes 1.5 GB. Steps with
and without a save in progress come from the same run, so other load on the machine affects both.
One checkpoint every 10 or 100 steps costs that time divided by the time of 10 or 100 steps.
"""

from __future__ import annotations

import argparse
import itertools
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

from gpt_dist.errors import GptDistError, UsageError, run_main


def settings(arguments: argparse.Namespace, data: Path) -> list[str]:
    """Flags of the run: quiet steps, a save, busy steps while it is written, and again."""
    period = arguments.quiet_steps + arguments.busy_steps
    values = {
        "config": "gpt2-124m",
        "device": "cpu",
        "data.path": data,
        "model.vocab_size": 50257,
        "model.context_length": arguments.context,
        "train.batch_tokens": arguments.tokens,
        "train.micro_batch_size": arguments.micro_batch,
        "train.steps": 1 + period * arguments.saves + arguments.busy_steps,
        "optim.warmup_steps": 0,
        "train.eval_every": 0,
        "train.sample_every": 0,
        "train.checkpoint_every": period,
    }
    return as_flags(values)


def row_times(process: subprocess.Popen[bytes], metrics: Path) -> list[float]:
    """When each row of a run's metrics appeared, by this process's clock."""
    times: list[float] = []
    while process.poll() is None:
        rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        times += [time.perf_counter()] * (rows - len(times))
        time.sleep(0.002)
    return times


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once; compare steps during a save with steps without."""
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=arguments.directory) as name:
        directory = Path(name)
        data, out = directory / "data", directory / "run"
        prepare_shakespeare(data, "char")
        torchrun = Path(sys.executable).with_name("torchrun")
        command = [str(torchrun), "--standalone", f"--nproc-per-node={arguments.ranks}"]
        command += ["-m", "gpt_dist.train", "--out_dir", str(out), *settings(arguments, data)]
        log = directory / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"CI": "1"}
            )
            times = row_times(process, out / "metrics.jsonl")
        if process.returncode:
            raise GptDistError(f"the run failed:\n{log.read_text()[-2000:]}")
        size = sum(
            file.stat().st_size for file in (out / "checkpoints").glob("step-*/*.safetensors")
        ) / len(list((out / "checkpoints").glob("step-*")))
    steps = [after - before for before, after in itertools.pairwise(times)]
    period = arguments.quiet_steps + arguments.busy_steps
    quiet: list[float] = []
    costs: list[float] = []
    for index, seconds in enumerate(steps, start=2):  # the duration of step `index`
        since_save = (index - 1) % period if index > period else arguments.busy_steps
        if since_save >= arguments.busy_steps:
            quiet.append(seconds)
    step = statistics.median(quiet)
    for save in range(1, arguments.saves + 1):
        after = steps[save * period - 1 :][: arguments.busy_steps]
        costs.append(sum(after) - len(after) * step)
    cost = statistics.median(costs)
    return {
        "step_s": round(step, 3),
        "quiet_steps_s": [round(value, 3) for value in quiet],
        "checkpoint_GB": round(size / 1e9, 3),
        "cost_of_a_checkpoint_s": [round(value, 3) for value in costs],
        "every_10_steps": round(cost / (10 * step), 4),
        "every_100_steps": round(cost / (100 * step), 4),
    }


def main() -> None:
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine (2)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per step (8192)")
    parser.add_argument("--context", type=int, default=256, help="context length (256)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per micro-batch (4)")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints to measure (3)")
    parser.add_argument(
        "--quiet-steps", type=int, default=1, help="undisturbed steps before each save (1)"
    )
    parser.add_argument("--busy-steps", type=int, default=5, help="steps a save may slow down (5)")
    parser.add_argument("--directory", metavar="DIR", help="directory of the run (temporary)")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    for name in ("saves", "quiet_steps", "busy_steps"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected 1 or more")
    result = measure(arguments)
    for key, value in result.items():
        print(f"{key:24s} {value}")
    print(
        f"cost: {result['every_10_steps']:.1%} every 10 steps, "
        f"{result['every_100_steps']:.2%} every 100 (limits: 5 % and 1 %)"
    )
    record(arguments.json, result)


if __name__ == "__main__":
    run_main(main)
