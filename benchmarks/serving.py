"""Decoding speed beside other engines, on random GPT-2 124M weights.

    python benchmarks/serving.py --json benchmarks/results/serving.json
    python benchmarks/serving.py --engines own llama_cpp openvino --dtypes bf16 int8

Prompts of 64 tokens, 64 new tokens, top-k 50, prefill included. Every engine (`benchmarks/engines`)
has its own process and, if it needs other packages, its own environment in the cache directory. The
engines take turns, so that all run under the same conditions.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from engines import ENGINES, NEW, VOCABULARY
from flags import benchmark_parser
from record import record, version_in
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, at_least, run_main
from gpt_dist.export import export_hf
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import load_tokenizer

HERE = Path(__file__).parent
DTYPES = ("fp32", "bf16", "int8")
TARGETS = {"bf16": 1.2, "int8": 1.4}
"""Wanted at each batch size: this project over the fastest peer of the same precision."""

Contestant = tuple[str, str]
"""What a table calls an engine, such as ``transformers bf16``, and the way it is run."""
Figures = dict[Contestant, dict[int, list[dict[str, float]]]]
"""What an engine answered for each batch size in each round."""


class Engine:
    """A process that measures one engine with one of its settings."""

    def __init__(self, name: str, python: Path, settings: dict[str, Any], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", "engines", json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment(),
            )  # fmt: skip
        self._read()

    def measure(self, batch: int) -> dict[str, float]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"batch": batch}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise failed(self.name, self.log.read_text())
        result: dict[str, float] = json.loads(line)
        return result

    def close(self) -> None:
        self._process.communicate(input="", timeout=20)


def environment() -> dict[str, str]:
    """Variables for an engine's process."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    return os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def failed(what: str, output: str) -> GptDistError:
    """The error that tells what an engine said last."""
    last = "\n".join(output.strip().splitlines()[-5:])
    return GptDistError(f"{what} failed; leave it out by --engines, or mend it:\n{last}")


def checked(what: str, command: list[str], variables: dict[str, str]) -> None:
    """Run a command to its end.

    Raises:
        GptDistError: it failed.
    """
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise failed(what, done.stdout + done.stderr)


def exported_model(folder: Path) -> Path:
    """GPT-2 124M with random weights, as a directory for Hugging Face."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=VOCABULARY)).eval()
    out = folder / "exported"
    export_hf(model, load_tokenizer("gpt2"), out, torch.float32)
    return out


def python_of(name: str) -> Path:
    """The Python of an engine's environment, which is created if missing."""
    engine = importlib.import_module(f"engines.{name}")
    if not hasattr(engine, "PACKAGES"):
        return Path(sys.executable)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_dist"
    folder = cache / "peers" / name
    if not (folder / "complete").exists():
        what = f"installing {' '.join(engine.PACKAGES)}"
        print(f"{name}: {what} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin/python"), "-m", "pip"]
        build = getattr(engine, "BUILD", {})
        checked(what, [*pip, "install", "-q", *engine.PACKAGES], build)
        if hasattr(engine, "UNWANTED"):
            checked(what, [*pip, "uninstall", "-q", "-y", *engine.UNWANTED], build)
        (folder / "complete").touch()
    return folder / "bin" / "python"


def start_engines(folder: Path, names: list[str], dtypes: list[str]) -> dict[Contestant, Engine]:
    """A process for each engine, precision and way to run it."""
    exported, started = exported_model(folder), {}
    for name in names:
        engine, python = importlib.import_module(f"engines.{name}"), python_of(name)
        for label, variants in engine.VARIANTS.items():
            if label.split()[-1] not in dtypes:
                continue
            for variant in variants:
                settings = variant | {
                    "engine": name, "exported": str(exported), "model": str(folder / label),
                    "threads": torch.get_num_threads(),
                }  # fmt: skip
                if hasattr(engine, "convert"):
                    converting = json.dumps(settings | {"convert": True})
                    command = [str(python), "-m", "engines", converting]
                    checked(f"converting for {label}", command, environment())
                way = " ".join(str(value) for key, value in variant.items() if key != "dtype")
                started[label, way] = Engine(label, python, settings, folder / f"{label} {way}.log")
    return started


def measure(engines: dict[Contestant, Engine], batches: list[int], rounds: int) -> Figures:
    """Measure all engines in turns, after one round to warm up.

    Of several ways to run an engine, each batch size goes on with the one that was fastest then.
    """
    first: Figures = {each: {} for each in engines}
    for each, batch in track(
        [(each, batch) for batch in batches for each in engines],
        "warming up", console=Console(stderr=True),
    ):  # fmt: skip
        first[each][batch] = [engines[each].measure(batch)]

    def fastest(each: Contestant, batch: int) -> bool:
        ways = [way for way in engines if way[0] == each[0]]
        return each == min(ways, key=lambda way: first[way][batch][0]["seconds"])

    turns = [(each, batch) for batch in batches for each in engines if fastest(each, batch)]
    figures: Figures = defaultdict(lambda: defaultdict(list))
    for each, batch in track(turns * rounds, "measuring", console=Console(stderr=True)):
        figures[each][batch].append(engines[each].measure(batch))
    return figures


def summarise(figures: Figures, batches: list[int]) -> dict[str, Any]:
    """Medians and spread of tokens/s, ratios to the peers by round, shares of bandwidth."""
    speeds: dict[str, dict[int, list[float]]] = defaultdict(dict)
    medians: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for (label, way), by_batch in figures.items():
        for batch, rounds in by_batch.items():
            found = [batch * NEW / figure["seconds"] for figure in rounds]
            speeds[label][batch] = found
            medians[label][batch] = {
                "median": statistics.median(found), "lowest": min(found), "highest": max(found),
                "setting": way,
            }  # fmt: skip

    def ratio(own: str, peer: str, batch: int) -> float:
        pairs = zip(speeds[own][batch], speeds[peer][batch], strict=True)
        return statistics.median(one / other for one, other in pairs)

    ratios = {
        f"gpt_dist {dtype} / {peer}": {
            batch: ratio(f"gpt_dist {dtype}", peer, batch) for batch in batches
        }
        for dtype in DTYPES
        for peer in speeds
        if peer.split()[-1] == dtype and not peer.startswith("gpt_dist")
        if f"gpt_dist {dtype}" in speeds
    }
    alone = {
        label.split()[-1]: {
            key: statistics.median(figure[key] for figure in by_batch[1])
            for key in ("step_ms", "bandwidth_gb_per_second", "share_of_bandwidth", "ready_seconds")
        }
        for (label, _), by_batch in figures.items()
        if label.startswith("gpt_dist") and 1 in by_batch
    }
    return {"tokens_per_second": medians, "ratios": ratios, "batch_1": alone}


def show(summary: dict[str, Any], batches: list[int]) -> None:
    console = Console()
    table = Table("tokens/s", *(f"batch {batch}" for batch in batches))
    for name, by_batch in summary["tokens_per_second"].items():
        table.add_row(
            name,
            *(
                "{median:,.0f} ({lowest:,.0f}–{highest:,.0f})".format(**by_batch[batch])
                for batch in batches
            ),
        )
    for name, by_batch in summary["ratios"].items():
        table.add_row(name, *(f"{by_batch[batch]:.2f}×" for batch in batches), style="bold")
    console.print(table)
    for dtype, wanted in TARGETS.items():
        found = [each for name, each in summary["ratios"].items() if name.endswith(dtype)]
        if found:
            least = ", ".join(f"{min(each[batch] for each in found):.2f}×" for batch in batches)
            console.print(f"{dtype}: {least} the fastest peer of each batch size; wanted {wanted}×")
    for dtype, facts in summary["batch_1"].items():
        console.print(
            f"{dtype}: a step {facts['step_ms']:.2f} ms, {facts['share_of_bandwidth']:.0%} of "
            f"{facts['bandwidth_gb_per_second']:.0f} GB/s ÷ bytes of weights (wanted 75%); ready "
            f"{facts['ready_seconds']:.1f} s after reading the checkpoint began"
        )


def versions(names: list[str]) -> dict[str, str]:
    """Versions of the peers' first packages."""
    found = {}
    for name in names:
        packages = getattr(importlib.import_module(f"engines.{name}"), "PACKAGES", ())
        for package in packages[:1]:
            found[name] = version_in(str(python_of(name)), re.split(r"[\[=]", package)[0])
    return found


def main() -> None:
    parser = benchmark_parser(__file__, __doc__)
    count = at_least(1, int)
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, metavar="NAME",
        default=["own", "transformers", "ctranslate2"],
        help=f"of {', '.join(ENGINES)}; default: the first three",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="default: all"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engines = start_engines(Path(folder), args.engines, args.dtypes)
        figures = measure(engines, args.batches, args.rounds)
        for engine in engines.values():
            engine.close()
    summary = summarise(figures, args.batches)
    show(summary, args.batches)
    own = ("transformers",) if "transformers" in args.engines else ()
    every = {" ".join(each).strip(): by_batch for each, by_batch in figures.items()}
    record(args.json, {**summary, "rounds": every}, own, versions(args.engines))


if __name__ == "__main__":
    run_main(main)
