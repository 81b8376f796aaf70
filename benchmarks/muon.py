"""Steps that Muon needs to reach AdamW's validation loss, on a small GPT-2.

    python -m gpt_dist.prepare text --source wikipedia.txt --tokenizer bpe --vocab-size 4096 \
        --out data/wikipedia
    python benchmarks/muon.py --data data/wikipedia --json benchmarks/results/muon-wikipedia.json

AdamW trains for --steps, Muon for --share of them; each schedule ends at its own last step. Each
optimizer's learning rate is swept on one seed, in factors of two until the best lies between two
worse ones; then both train from --seeds seeds at their best. Muon holds where its mean loss is at
most AdamW's. Losses do not depend on speed, so as many runs as there are cores go on at once.
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

from flags import as_flags
from record import record

from gpt_dist.errors import GptDistError, UsageError, run_main
from gpt_dist.parallel.world import available_cpus

FIRST_RATES = {"adamw": [1e-3, 2e-3, 4e-3], "muon": [2e-3, 4e-3, 8e-3]}
"""Where each sweep begins."""

SEEDS = (1, 2, 3)
"""The sweep's is the first."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    optimizer: str
    steps: int
    rate: float
    seed: int


class Lab:
    """Trains runs, several at a time and each once."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments, self.directory = arguments, directory
        self.losses: dict[Run, float] = {}
        self.curves: dict[Run, list[tuple[int, float]]] = {}
        self.parameters = ""

    def train(self, runs: list[Run]) -> None:
        """Train what was not trained before."""
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
        """Runs of one seed, best first."""
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
    """Sweep, then the seeds."""
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


def draw(result: dict[str, Any], path: str) -> None:
    """The sweep, and the validation loss of all seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (name, found) in zip(("C0", "C1"), result["optimizers"].items(), strict=True):
        rates = [float(rate) for rate in found["sweep"]]
        label = f"{name}, {found['steps']} steps"
        left.plot(rates, list(found["sweep"].values()), "o-", color=color, label=label)
        for number, curve in enumerate(found["curves"]):
            steps, losses = zip(*curve[1:], strict=True)
            shown = label if number == 0 else None
            right.plot(steps, losses, color=color, linewidth=1, label=shown)
    left.set(xscale="log", xlabel="learning rate", ylabel="validation loss at the end")
    best = result["optimizers"]["adamw"]["mean"]
    right.axhline(best, color="gray", linewidth=0.8, linestyle=":")
    right.set(xlabel="step", ylabel="validation loss")
    left.legend()
    right.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/muon.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="a prepared data set")
    parser.add_argument("--steps", type=int, default=500, help="AdamW's steps (500)")
    parser.add_argument("--share", type=float, default=0.6, help="Muon's share of them (0.6)")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="seeds (3)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step (4096)")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence (128)")
    parser.add_argument("--n-layer", type=int, default=4, help="blocks (4)")
    parser.add_argument("--n-head", type=int, default=4, help="heads (4)")
    parser.add_argument("--n-embd", type=int, default=128, help="width (128)")
    parser.add_argument("--warmup", type=int, default=30, help="steps of warm-up (30)")
    parser.add_argument("--eval-tokens", type=int, default=131072, help="validation (131072)")
    parser.add_argument("--jobs", type=int, default=available_cpus(), help="runs at once (cores)")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument("--picture", metavar="FILE", help="draw sweep and curves")
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
        draw(result, arguments.picture)


if __name__ == "__main__":
    run_main(main)
