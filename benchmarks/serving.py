"""Decoding speed compared with transformers and CTranslate2, on random GPT-2 124M weights.

    python benchmarks/serving.py --json benchmarks/results/serving.json

Prompts of 64 tokens, 64 new tokens, top-k 50. Every engine has its own process, and the engines
take turns, so that all run under the same conditions. CTranslate2 gets its own environment in the
cache directory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record, version_in
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gpt_dist.checkpoints.writer import write_checkpoint
from gpt_dist.config.settings import Config
from gpt_dist.model.gpt import GPT, VOCAB_PARAMETERS
from gpt_dist.text.tokenizers import load_tokenizer

HERE = Path(__file__).parent
VOCABULARY = 50257
NEW = 64
TRANSFORMERS = [("sdpa", "dynamic"), ("eager", "dynamic"), ("sdpa", "static")]
"""Settings of transformers. The fastest one per batch size is the peer."""
TARGETS = {"bf16": (2.3, 2.5, 3.0), "int8": (1.5, 1.5, 1.5)}
"""Required at batch 1, 8 and 32: bf16 over transformers' bf16, int8 over CTranslate2's int8."""


class Engine:
    """A process that measures one engine."""

    def __init__(self, python: Path | str, **settings: Any) -> None:
        self._process = subprocess.Popen(
            [str(python), str(HERE / "serving_engines.py"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parent), "TOKENIZERS_PARALLELISM": "false"},
        )
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
            raise SystemExit(f"an engine failed: {' '.join(self._process.args[1:])}")  # type: ignore
        result: dict[str, float] = json.loads(line)
        return result

    def close(self) -> None:
        self._process.communicate(input="", timeout=20)


def prepare_weights(folder: Path) -> Path:
    """Random GPT-2 124M weights, as a checkpoint and as an .npz in Hugging Face's layout."""
    torch.manual_seed(0)
    config = Config.model_validate({"model": {"vocab_size": VOCABULARY}})
    model = GPT(config.model)
    tensors, arrays = {}, {}
    for name, tensor in model.state_dict().items():
        cut = tensor[:VOCABULARY] if name in VOCAB_PARAMETERS else tensor
        tensors[f"model.{name}"] = cut.contiguous()
        arrays[name] = cut.numpy()
    np.savez(folder / "weights.npz", **arrays)  # type: ignore[arg-type]
    checkpoint = folder / "step-00000001"
    checkpoint.mkdir()
    state = {"step": 1, "config": config.model_dump()}
    write_checkpoint(checkpoint, tensors, state, load_tokenizer("gpt2"))
    return checkpoint


def peer_environment() -> Path:
    """The Python of CTranslate2's environment, which is created if missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_dist"
    folder = cache / "peers" / "ctranslate2"
    python = folder / "bin" / "python"
    ready = [str(python), "-c", "import ctranslate2"]
    if not python.exists() or subprocess.run(ready, stderr=subprocess.DEVNULL).returncode:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "ctranslate2", "numpy"], check=True
        )
    return python


def start_engines(folder: Path, peers: bool) -> dict[str, Engine]:
    checkpoint, threads = prepare_weights(folder), torch.get_num_threads()
    engines = {
        f"gpt_dist {dtype}": Engine(
            sys.executable, name="gpt_dist", dtype=dtype, checkpoint=str(checkpoint)
        )
        for dtype in ("fp32", "bf16", "int8")
    }
    if not peers:
        return engines
    python = peer_environment()
    converted = str(folder / "ctranslate2")
    settings = {"name": "convert", "weights": str(folder / "weights.npz"), "directory": converted}
    subprocess.run(
        [str(python), str(HERE / "serving_engines.py"), json.dumps(settings)], check=True
    )
    for attention, cache in TRANSFORMERS:
        engines[f"transformers bf16 {attention} {cache}"] = Engine(
            sys.executable, name="transformers", dtype="bfloat16", attention=attention, cache=cache
        )
    for dtype, name in (("fp32", "float32"), ("int8", "int8")):
        engines[f"CTranslate2 {dtype}"] = Engine(
            python, name="ctranslate2", dtype=name, directory=converted, threads=threads
        )
    return engines


def measure(engines: dict[str, Engine], batches: list[int], rounds: int) -> dict[str, Any]:
    """Results of every engine and batch size: {engine: {batch: [a dictionary per round]}}."""
    figures: dict[str, Any] = {name: {batch: [] for batch in batches} for name in engines}
    turns = [
        (number, batch, name)
        for number in range(-1, rounds)
        for batch in batches
        for name in engines
    ]
    chosen: set[tuple[int, str]] = set()
    for number, batch, name in track(turns, "measuring", console=Console(stderr=True)):
        if number == 0 and not chosen:
            chosen = best_transformers(figures, batches)
        if number < 0 or not name.startswith("transformers") or (batch, name) in chosen:
            figures[name][batch].append(engines[name].measure(batch))
    for by_batch in figures.values():  # drop the warm-up round
        for batch in batches:
            by_batch[batch] = by_batch[batch][1:]
    return figures


def best_transformers(figures: dict[str, Any], batches: list[int]) -> set[tuple[int, str]]:
    """The fastest setting of transformers for each batch size, in the warm-up round."""
    names = [name for name in figures if name.startswith("transformers")]
    if not names:
        return set()
    return {
        (batch, min(names, key=lambda name: figures[name][batch][0]["seconds"]))
        for batch in batches
    }


def summarise(figures: dict[str, Any], batches: list[int]) -> dict[str, Any]:
    """Medians and spread of tokens/s, ratios to the peers by round, shares of bandwidth."""
    summary: dict[str, Any] = {"tokens_per_second": {}, "ratios": {}, "batch_1": {}}
    by_round: dict[str, dict[int, list[float]]] = {}
    for name, by_batch in figures.items():
        short = "transformers bf16" if name.startswith("transformers") else name
        for batch in batches:
            speeds = [batch * NEW / figure["seconds"] for figure in by_batch[batch]]
            if speeds:
                by_round.setdefault(short, {})[batch] = speeds
                summary["tokens_per_second"].setdefault(short, {})[batch] = {
                    "median": statistics.median(speeds), "lowest": min(speeds),
                    "highest": max(speeds), "setting": name,
                }  # fmt: skip
    for dtype, peer in (("bf16", "transformers bf16"), ("int8", "CTranslate2 int8")):
        if peer in by_round:
            summary["ratios"][f"gpt_dist {dtype} / {peer}"] = {
                batch: statistics.median(
                    own / other
                    for own, other in zip(
                        by_round[f"gpt_dist {dtype}"][batch], by_round[peer][batch], strict=True
                    )
                )
                for batch in batches
            }
    for dtype in ("fp32", "bf16", "int8"):
        ones = figures[f"gpt_dist {dtype}"].get(1, [])
        if ones:
            summary["batch_1"][dtype] = {
                key: statistics.median(figure[key] for figure in ones)
                for key in (
                    "step_ms", "bandwidth_gb_per_second", "share_of_bandwidth", "ready_seconds"
                )
            }  # fmt: skip
    return summary


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
        wanted = dict(zip((1, 8, 32), TARGETS[name.split()[1]], strict=True))
        cells = [
            f"{by_batch[batch]:.2f}×" + (f", wanted {wanted[batch]}×" if batch in wanted else "")
            for batch in batches
        ]
        table.add_row(name, *cells, style="bold")
    console.print(table)
    for dtype, facts in summary["batch_1"].items():
        console.print(
            f"{dtype}: a step {facts['step_ms']:.2f} ms, {facts['share_of_bandwidth']:.0%} of "
            f"{facts['bandwidth_gb_per_second']:.0f} GB/s ÷ bytes of weights (wanted 75%); ready "
            f"{facts['ready_seconds']:.1f} s after reading the checkpoint began"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--no-peers", action="store_true", help="measure this project only")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engines = start_engines(Path(folder), not args.no_peers)
        figures = measure(engines, args.batches, args.rounds)
        for engine in engines.values():
            engine.close()
    summary = summarise(figures, args.batches)
    show(summary, args.batches)
    peers = {}
    if not args.no_peers:
        peers["ctranslate2"] = version_in(str(peer_environment()), "ctranslate2")
    record(args.json, {**summary, "rounds": figures}, ("transformers",), peers)


if __name__ == "__main__":
    main()
