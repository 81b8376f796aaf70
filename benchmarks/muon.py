"""Muon against AdamW on a small GPT-2: does Muon reach AdamW's loss in fewer steps?

    python -m gpt_dist.prepare text --source wikipedia.txt --tokenizer bpe --vocab-size 4096 \
        --out data/wikipedia
    python benchmarks/muon.py --data data/wikipedia --json benchmarks/results/muon-wikipedia.json

AdamW trains for --steps, Muon for --share of them; each schedule ends at its own last step.
The learning rate of each optimizer is swept on one seed, in factors of two, until the best rate has
a worse one on either side. Then both train with --seeds seeds at their best rates. Muon wins if its
mean loss is not above AdamW's. Losses do not depend on speed, so one run per core runs at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pictures
from flags import as_flags, benchmark_parser
from record import record

from gpt_dist.errors import GptDistError, UsageError, run_main
from gpt_dist.parallel.world import available_cpus

FIRST_RATES = {"adamw": [1e-3, 2e-3, 4e-3], "muon": [2e-3, 4e-3, 8e-3]}
"""The first rates of each sweep."""

SEEDS = (1, 2, 3)
"""The sweep uses the first."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    optimizer: str
    steps: int
    rate: float
    seed: int


class Lab:
    """Trains runs: several at a time, each once."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments, self.directory = arguments, directory
        self.losses: dict[Run, float] = {}
        self.curves: dict[Run, list[tuple[int, float]]] = {}
        self.parameters = ""

    def train(self, runs: list[Run]) -> None:
        """Train those runs that are new."""
        new = [run for run in runs if run not in self.losses]
        with ThreadPoolExecutor(max_workers=self.arguments.jobs) as pool:
            for run, curve in zip(new, pool.map(self._train, new), strict=True):
                self.curves[run] = curve
                self.losses[run] = curve[-1][1]
                print(
                    f"{run.optimizer:6s} {run.steps} steps, lr {run.rate:.1e}, seed {run.seed}: "
                    f"validation loss {self.losses[run]:.4f}",
                    flush=True,
                )

    def _train(self, run: Run) -> list[tuple[int, float]]:
        out = self.directory / f"{run.optimizer}-{run.steps}-{run.rate:g}-{run.seed}"
        arguments = self.arguments
        settings = {
            "out_dir": out,
            "device": "cpu",
            "data.path": arguments.data,
            "model.n_layer": arguments.n_layer,
            "model.n_head": arguments.n_head,
            "model.n_embd": arguments.n_embd,
            "model.context_length": arguments.context,
            "optim.name": run.optimizer,
            "optim.lr": run.rate,
            "optim.min_lr": run.rate / 20,
            "optim.warmup_steps": arguments.warmup,
            "seed": run.seed,
            "train.steps": run.steps,
            "train.batch_tokens": arguments.tokens,
            "train.micro_batch_size": arguments.tokens // arguments.context,
            "train.eval_every": max(1, run.steps // 6),
            "train.eval_tokens": arguments.eval_tokens,
            "train.checkpoint_every": 0,
            "train.sample_every": 0,
        }
        flags = as_flags(settings)
        done = subprocess.run(
            [sys.executable, "-m", "gpt_dist.train", *flags],
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, available_cpus() // arguments.jobs))},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise GptDistError(f"{run} failed:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
        self.parameters = done.stdout.split(" parameters")[0].split()[-1]
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]

    def sweep(self, optimizer: str, steps: int) -> list[Run]:
        """Sweep the learning rate on one seed; the runs, best first."""
        rates = list(FIRST_RATES[optimizer])
        while True:
            runs = [Run(optimizer, steps, rate, SEEDS[0]) for rate in rates]
            self.train(runs)
            best = min(runs, key=self.losses.__getitem__)
            if best is runs[0]:
                rates.insert(0, best.rate / 2)
            elif best is runs[-1]:
                rates.append(best.rate * 2)
            else:
                return sorted(runs, key=self.losses.__getitem__)


def measure(lab: Lab, arguments: argparse.Namespace) -> dict[str, Any]:
    """Sweep both optimizers, then train all seeds at the best rates."""
    result: dict[str, Any] = {"optimizers": {}}
    means = {}
    seeds = SEEDS[: arguments.seeds]
    for name, share in (("adamw", 1.0), ("muon", arguments.share)):
        steps = round(arguments.steps * share)
        swept = lab.sweep(name, steps)
        runs = [Run(name, steps, swept[0].rate, seed) for seed in seeds]
        lab.train(runs)
        losses = [lab.losses[run] for run in runs]
        means[name] = statistics.mean(losses)
        result["optimizers"][name] = {
            "steps": steps,
            "sweep": {
                f"{run.rate:g}": lab.losses[run] for run in sorted(swept, key=lambda r: r.rate)
            },
            "lr": swept[0].rate,
            "losses": losses,
            "mean": means[name],
            "standard_deviation": statistics.stdev(losses) if len(losses) > 1 else 0.0,
            "curves": [lab.curves[run] for run in runs],
        }
    result["share_of_steps"] = arguments.share
    result["reached"] = means["muon"] <= means["adamw"]
    result["parameters"], result["data"] = lab.parameters, Path(arguments.data).name
    return result


def main() -> None:
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="prepared data set")
    parser.add_argument("--steps", type=int, default=500, help="AdamW's steps (500)")
    parser.add_argument("--share", type=float, default=0.6, help="Muon's share of them (0.6)")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="seeds (3)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step (4096)")
    parser.add_argument("--context", type=int, default=128, help="context length (128)")
    parser.add_argument("--n-layer", type=int, default=4, help="blocks (4)")
    parser.add_argument("--n-head", type=int, default=4, help="heads (4)")
    parser.add_argument("--n-embd", type=int, default=128, help="width (128)")
    parser.add_argument("--warmup", type=int, default=30, help="steps of warm-up (30)")
    parser.add_argument("--eval-tokens", type=int, default=131072, help="of a validation (131072)")
    parser.add_argument("--jobs", type=int, default=available_cpus(), help="runs at once (cores)")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument("--picture", metavar="FILE", help="draw the result here")
    arguments = parser.parse_args()
    if not 0 < arguments.share <= 1:
        raise UsageError("--share: expected a number above 0, up to 1")
    with tempfile.TemporaryDirectory(prefix="muon-") as name:
        result = measure(Lab(arguments, Path(name)), arguments)
    adamw, muon = result["optimizers"]["adamw"], result["optimizers"]["muon"]
    for label, found in (("AdamW", adamw), ("Muon", muon)):
        print(
            f"{label:6s} {found['steps']} steps, lr {found['lr']:g}: "
            f"{found['mean']:.4f} +- {found['standard_deviation']:.4f}"
        )
    verdict = "reaches" if result["reached"] else "does not reach"
    print(f"Muon {verdict} AdamW's loss in {result['share_of_steps']:.0%} of its steps")
    record(arguments.json, result)
    if arguments.picture:
        pictures.muon(result, Path(arguments.picture))


if __name__ == "__main__":
    run_main(main)
