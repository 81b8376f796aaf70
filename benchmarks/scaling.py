"""How training scales: measured on this machine or on a Slurm cluster, and computed on paper.

    python benchmarks/scaling.py                           # 1 and 2 ranks here, one thread each
    python benchmarks/scaling.py --nodes 1 2 4 8           # jobs on a Slurm cluster, a table
    python benchmarks/scaling.py --model                   # 8 to 1,024 GPUs on paper
    python benchmarks/scaling.py --memory                  # what each preset needs on a rank

Each rank does the same work in every measured run (--accumulation micro-batches per step), so the
ideal is a speed proportional to the number of ranks. All sizes run in turn, --repeat times; the
table shows medians. With --nodes each run is a job, `sbatch launch/slurm/train.sbatch`;
--sbatch adds flags for sbatch and --train flags for gpt_dist.train, for example

    python benchmarks/scaling.py --nodes 1 2 4 --sbatch=--gres=gpu:4 --train "--config gpt2-350m"
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import scaling_model
from flags import as_flags, benchmark_parser, prepare_shakespeare
from record import record

from gpt_dist.errors import GptDistError, UsageError, run_main

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 1
"""Steps at the start of a run that are not measured."""


def measured_speed(out: Path) -> float:
    """Median tokens per second of a run."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    speeds: list[float] = [
        row["tokens_per_second"] for row in map(json.loads, lines) if "train_loss" in row
    ]
    return statistics.median(speeds[WARM_UP:])


def run_here(ranks: int, flags: list[str], out: Path) -> None:
    """Train with ``ranks`` ranks on this machine, one thread each."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [str(torchrun), "--standalone", f"--nproc-per-node={ranks}", "-m", "gpt_dist.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out_dir", str(out), *flags], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise GptDistError(f"training with {ranks} ranks failed:\n{done.stderr[-2000:]}")


def run_on_nodes(nodes: int, flags: list[str], out: Path, sbatch: list[str]) -> None:
    """Train on ``nodes`` nodes of a Slurm cluster; return when the job has ended."""
    script = ROOT / "launch/slurm/train.sbatch"
    command = ["sbatch", "--wait", f"--nodes={nodes}", f"--output={out}.log", *sbatch, str(script)]
    done = subprocess.run([*command, "--out_dir", str(out), *flags], capture_output=True, text=True)
    if done.returncode:
        raise GptDistError(
            f"the job on {nodes} nodes failed ({done.stderr.strip()}); see {out}.log"
        )


def flags_for(arguments: argparse.Namespace, ranks: int) -> list[str]:
    """Settings of a measured run; those of --train come last and win."""
    tokens = arguments.micro_batch * arguments.context * arguments.accumulation * ranks
    settings = {
        "model.context_length": arguments.context,
        "model.vocab_size": 50257,
        "train.micro_batch_size": arguments.micro_batch,
        "train.batch_tokens": tokens,
        "train.steps": arguments.steps + WARM_UP,
        "optim.warmup_steps": 0,
        "train.eval_every": 0,
        "train.sample_every": 0,
        "train.checkpoint_every": 0,
    }
    return as_flags(settings) + shlex.split(arguments.train)


def measure(arguments: argparse.Namespace) -> None:
    """Run all sizes in turn; print and record the table."""
    sizes = arguments.nodes or arguments.ranks
    unit = "nodes" if arguments.nodes else "ranks"
    speeds: dict[int, list[float]] = {size: [] for size in sizes}
    # On a cluster all nodes must see the directory.
    parent = Path("runs") if arguments.nodes else None
    if parent:
        parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scaling-", dir=parent) as name:
        directory = Path(name).resolve()
        data = directory / "data"
        prepare_shakespeare(data, "char")
        for turn in range(arguments.repeat):
            for size in sizes:
                out = directory / f"{size}-{turn}"
                ranks = size * (arguments.ranks_per_node if arguments.nodes else 1)
                flags = ["--data.path", str(data), *flags_for(arguments, ranks)]
                if arguments.nodes:
                    run_on_nodes(size, flags, out, arguments.sbatch)
                else:
                    run_here(size, flags, out)
                speeds[size].append(measured_speed(out))
                print(f"{size} {unit}: {speeds[size][-1]:,.0f} tokens/s", flush=True)
    base = statistics.median(speeds[sizes[0]]) / sizes[0]
    rows = []
    print(f"\n{unit:>6s}  tokens/s    over {sizes[0]}   efficiency")
    for size in sizes:
        speed = statistics.median(speeds[size])
        times = speed / base / sizes[0]
        rows.append(
            {
                unit: size,
                "tokens_per_second": speed,
                "runs": speeds[size],
                "speed_up": times,
                "efficiency": speed / base / size,
            }
        )
        print(f"{size:6d}  {speed:10,.1f}  {times:6.3f}  {speed / base / size:10.1%}")
    record(arguments.json, {"flags": flags_for(arguments, 1), "table": rows})


def main() -> None:
    parser = benchmark_parser(__file__, __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", action="store_true", help="compute step times instead")
    what.add_argument("--memory", action="store_true", help="compute memory by preset instead")
    what.add_argument("--nodes", type=int, nargs="+", help="numbers of Slurm nodes to measure")
    what.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1, 2],
        help="numbers of ranks to measure here (1 2)",
    )
    parser.add_argument("--ranks-per-node", type=int, default=8, help="GPUs per node (8)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per run (3)")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each size (2)")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches per step (8)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per micro-batch (4)")
    parser.add_argument("--context", type=int, default=256, help="context length (256)")
    parser.add_argument("--sbatch", action="append", default=[], help="flag for sbatch; repeatable")
    parser.add_argument("--train", default="", help="flags for gpt_dist.train")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    for name in ("steps", "repeat", "accumulation", "micro_batch", "context"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected 1 or more")
    if arguments.model:
        print(scaling_model.report())
    elif arguments.memory:
        print(scaling_model.memory_report())
    else:
        measure(arguments)


if __name__ == "__main__":
    run_main(main)
