"""Recipes beside each other: which loss, after how many steps, over several seeds.

    python benchmarks/learning.py --data data/wikipedia --seeds 8 \\
        --recipe "GPT-2, AdamW" 500 "" \\
        --recipe "GPT-2, Muon" 300 "--optim.name muon" \\
        --recipe "nanochat, Muon" 175 "--optim.name muon --model.architecture nanochat" \\
        --json benchmarks/results/learning-wikipedia.json

Each recipe has its own number of steps, at whose end its schedule ends, and its own settings on top
of those that all share. Its learning rate is swept on the first seed, in factors of two, until the
best one has a worse one on either side; then it trains with all seeds. A recipe is better than the
first one if its mean loss is lower and a one-sided Welch test says so at p < 0.01, the rule of
github.com/KellerJordan/modded-nanogpt, track 3. A recipe with ``--optim.average`` is scored by that
average of its weights. Losses do not depend on speed, so one run per core runs at a time.

The file of --json is written after each recipe. The same command at the same commit goes
on with those that it lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pictures
import torch
import yaml
from flags import as_flags, benchmark_parser
from record import command, commit, record
from scipy import stats

from gpt_dist.checkpoints.reader import load_model
from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.loader import validation_batches
from gpt_dist.errors import GptDistError, UsageError, at_least, run_main
from gpt_dist.parallel.world import available_cpus

SIGNIFICANT = 0.01
"""A difference counts if chance makes one as large less often than this."""


@dataclass(frozen=True)
class Recipe:
    """A name, the number of steps, and settings as flags of ``gpt_dist.train``."""

    name: str
    steps: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One training run."""

    recipe: Recipe
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    curve: list[tuple[int, float]]
    """(step, validation loss)."""
    parameters: str

    @property
    def loss(self) -> float:
        """Validation loss at the end."""
        return self.curve[-1][1]


def average_loss(run: Path, arguments: argparse.Namespace) -> float:
    """Validation loss of the average of the weights with which a run ended."""
    model, _, _ = load_model(run, average=True)
    stream = open_dataset(arguments.data).split("val")
    assert stream is not None  # the run was validated on it
    batches = validation_batches(
        stream, context=arguments.context, tokens=arguments.eval_tokens,
        micro_batch=arguments.tokens // arguments.context, rank=0, world_size=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    with torch.inference_mode():
        total = sum(float(model(batch.ids, batch.targets)) for batch in batches)
    return total / float(min(arguments.eval_tokens, len(stream) - 1))


class Lab:
    """Trains runs: several at a time, each once."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments, self.directory = arguments, directory
        self.outcomes: dict[Run, Outcome] = {}

    def train(self, runs: list[Run]) -> list[Outcome]:
        """Train those runs that are new; the outcomes of all."""
        new = [run for run in dict.fromkeys(runs) if run not in self.outcomes]
        with ThreadPoolExecutor(max_workers=self.arguments.jobs) as pool:
            for run, outcome in zip(new, pool.map(self._train, new), strict=True):
                self.outcomes[run] = outcome
                print(
                    f"{run.recipe.name}: {run.recipe.steps} steps, lr {run.rate:.1e}, seed "
                    f"{run.seed}: validation loss {outcome.loss:.4f}",
                    flush=True,
                )
        return [self.outcomes[run] for run in runs]

    def _train(self, run: Run) -> Outcome:
        arguments, steps = self.arguments, run.recipe.steps
        out = Path(tempfile.mkdtemp(dir=self.directory))
        settings = {
            "out_dir": out / "run",
            "device": "cpu",
            "data.path": arguments.data,
            "model.n_layer": arguments.n_layer,
            "model.n_head": arguments.n_head,
            "model.n_embd": arguments.n_embd,
            "model.context_length": arguments.context,
            "optim.lr": run.rate,
            "optim.min_lr": run.rate / 20,
            "optim.warmup_steps": min(arguments.warmup, steps),
            "seed": run.seed,
            "train.steps": steps,
            "train.batch_tokens": arguments.tokens,
            "train.micro_batch_size": arguments.tokens // arguments.context,
            "train.eval_every": max(1, steps // 4),
            "train.eval_tokens": arguments.eval_tokens,
            "train.checkpoint_every": 0,
            "train.sample_every": 0,
        }
        done = subprocess.run(
            [sys.executable, "-m", "gpt_dist.train", *as_flags(settings), *run.recipe.flags],
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, available_cpus() // arguments.jobs))},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise GptDistError(f"{run} failed:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
        lines = (out / "run/metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        curve = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
        if yaml.safe_load((out / "run/config.yaml").read_text())["optim"]["average"]:
            curve[-1] = (steps, average_loss(out / "run", arguments))
        shutil.rmtree(out)
        return Outcome(curve, done.stdout.split(" parameters")[0].split()[-1])

    def sweep(self, recipe: Recipe) -> dict[float, float]:
        """Loss by learning rate, on the first seed."""
        rates = [self.arguments.rate * factor for factor in (0.5, 1, 2)]
        while True:
            runs = [Run(recipe, rate, 1) for rate in rates]
            losses = [outcome.loss for outcome in self.train(runs)]
            best = losses.index(min(losses))
            if best == 0:
                rates.insert(0, rates[0] / 2)
            elif best == len(rates) - 1:
                rates.append(rates[-1] * 2)
            else:
                return dict(zip(rates, losses, strict=True))


def first_step_below(curve: list[tuple[int, float]], loss: float) -> int | None:
    """The first validation at which a curve is not above ``loss``."""
    return next((step for step, found in curve if found <= loss), None)


def compare(found: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """A recipe beside the first one."""
    test = stats.ttest_ind(found["losses"], first["losses"], equal_var=False, alternative="less")
    mean = [
        (points[0][0], statistics.mean(loss for _, loss in points))
        for points in zip(*found["curves"], strict=True)
    ]
    return {
        "share_of_steps": found["steps"] / first["steps"],
        "lower_by": first["mean"] - found["mean"],
        "p": float(test.pvalue),
        "significant": bool(test.pvalue < SIGNIFICANT),
        "reaches_its_loss_at_step": first_step_below(mean, first["mean"]),
    }


def done_before(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The recipes that the same command and code have measured before, by name."""
    path = Path(arguments.json or "")
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        same = (found["command"], found["commit"]) == (command(), commit())
    except (ValueError, KeyError, TypeError):
        raise GptDistError(f"{path} is no record; delete it, or choose another --json") from None
    return dict(found["recipes"]) if same else {}


def measure(lab: Lab, recipes: list[Recipe]) -> Iterator[dict[str, Any]]:
    """Sweep each recipe, then train all seeds at its best rate; the result after each recipe."""
    arguments = lab.arguments
    before = done_before(arguments)
    result: dict[str, Any] = {"data": Path(arguments.data).name, "recipes": {}}
    for recipe in recipes:
        if recipe.name in before:
            result["recipes"][recipe.name] = before[recipe.name]
            yield result
            continue
        sweep = lab.sweep(recipe)
        rate = min(sweep, key=sweep.__getitem__)
        outcomes = lab.train([Run(recipe, rate, seed + 1) for seed in range(arguments.seeds)])
        losses = [outcome.loss for outcome in outcomes]
        found = {
            "flags": shlex.join(recipe.flags),
            "steps": recipe.steps,
            "tokens": recipe.steps * arguments.tokens,
            "parameters": outcomes[0].parameters,
            "sweep": {f"{key:g}": loss for key, loss in sweep.items()},
            "lr": rate,
            "losses": losses,
            "mean": statistics.mean(losses),
            "standard_deviation": statistics.stdev(losses),
            "curves": [outcome.curve for outcome in outcomes],
        }
        if result["recipes"]:
            found["beside_the_first"] = compare(found, next(iter(result["recipes"].values())))
        result["recipes"][recipe.name] = found
        yield result


def verdict(found: dict[str, Any]) -> str:
    """One recipe's line."""
    line = (
        f"{found['steps']} steps, {found['tokens']:,} tokens, lr "
        f"{found['lr']:g}: {found['mean']:.4f} +- {found['standard_deviation']:.4f}"
    )
    if beside := found.get("beside_the_first"):
        word = "lower" if beside["lower_by"] > 0 else "higher"
        line += (
            f"; {abs(beside['lower_by']):.4f} {word} than the first in "
            f"{beside['share_of_steps']:.0%} of its steps, p = {beside['p']:.2g}"
        )
    return line


def parsed_recipes(given: list[list[str]]) -> list[Recipe]:
    """The recipes of the command line.

    Raises:
        UsageError: a number of steps is not one, or a name comes twice.
    """
    for name, steps, _ in given:
        if not steps.isdecimal() or int(steps) < 1:
            raise UsageError(f"--recipe {name!r} {steps}: expected a number of steps from 1 on")
    if len({name for name, _, _ in given}) < len(given):
        raise UsageError("--recipe: two recipes have the same name")
    return [Recipe(name, int(steps), tuple(shlex.split(flags))) for name, steps, flags in given]


def main() -> None:
    parser, count = benchmark_parser(__file__, __doc__), at_least(1, int)
    parser.add_argument("--data", required=True, metavar="DIR", help="prepared data set")
    parser.add_argument(
        "--recipe", nargs=3, action="append", required=True, metavar=("NAME", "STEPS", "FLAGS"),
        help="what to compare; the others are held against the first",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=at_least(1e-9, float), default=2e-3, help="where sweeps begin (0.002)"
    )
    parser.add_argument(
        "--seeds", type=at_least(2, int), default=3, help="2 or more, to tell the spread (3)"
    )
    parser.add_argument("--tokens", type=count, default=4096, help="tokens per step (4096)")
    parser.add_argument("--context", type=count, default=128, help="context length (128)")
    parser.add_argument("--n-layer", type=count, default=4, help="blocks (4)")
    parser.add_argument("--n-head", type=count, default=4, help="heads (4)")
    parser.add_argument("--n-embd", type=count, default=128, help="width (128)")
    parser.add_argument("--warmup", type=at_least(0, int), default=30, help="steps of warm-up (30)")
    parser.add_argument(
        "--eval-tokens", type=count, default=131072, help="of a validation (131072)"
    )
    parser.add_argument("--jobs", type=count, default=available_cpus(), help="runs at once (cores)")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument("--picture", metavar="FILE", help="draw the result here")
    arguments = parser.parse_args()
    recipes = parsed_recipes(arguments.recipe)
    with tempfile.TemporaryDirectory(prefix="learning-") as name:
        for result in measure(Lab(arguments, Path(name)), recipes):
            record(arguments.json, result, packages=("scipy",))
    for recipe, found in result["recipes"].items():
        print(f"{recipe}: {verdict(found)}")
    if arguments.picture:
        pictures.learning(result, Path(arguments.picture))


if __name__ == "__main__":
    run_main(main)
