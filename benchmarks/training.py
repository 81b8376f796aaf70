"""Training speed beside transformers and litgpt: same shape, batch, data and machine, in one run.

    python benchmarks/training.py --peers-python peers/bin/python --json results.json
    python benchmarks/training.py --device cuda --context 1024

Each trainer lives in a process of its own (``peers.py``); they take turns, A B C A B C, so that a
machine that slows down slows all of them. litgpt needs an environment of its own
(``--peers-python``); without it, or with ``--trainers``, it is left out and the result says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import record, version_in

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt_dist.config.settings import ModelConfig
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.world import available_cpus

PEERS = Path(__file__).with_name("peers.py")
SHAPES = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768},
}


class Trainer:
    """One trainer's process."""

    def __init__(self, name: str, python: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, str(PEERS), json.dumps({**settings, "name": name})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if settings["verbose"] else subprocess.DEVNULL,
            text=True,
        )

    def run(self, accumulate: int, steps: int) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps({"accumulate": accumulate, "steps": steps}), file=self.process.stdin)
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; --verbose shows why")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def matmul_flops(device: torch.device, size: int, seconds: float = 1.0) -> float:
    """Best FLOP/s of square bf16 matrix products."""
    import time

    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in "ab")
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(
    trainers: list[Trainer], accumulate: int, rounds: int, steps: int, tokens: int
) -> dict[str, Any]:
    """Tokens per second of each trainer's optimizer steps, and peak memory."""
    seconds: dict[str, list[float]] = {t.name: [] for t in trainers}
    peak = dict.fromkeys(seconds, 0)
    for _ in range(rounds):
        for trainer in trainers:
            reply = trainer.run(accumulate, steps)
            seconds[trainer.name] += reply["seconds"]
            peak[trainer.name] = max(peak[trainer.name], reply["peak_bytes"])
    result: dict[str, Any] = {}
    for name, times in seconds.items():
        rates = sorted(accumulate * tokens / t for t in times)
        result[name] = {
            "tokens_per_second": statistics.median(rates),
            "lowest": rates[0],
            "highest": rates[-1],
            "steps": len(rates),
            "peak_gb": peak[name] / 1e9,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="124m")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument(
        "--micro-batch", type=int, nargs="*", help="sizes to try (default: 4; cuda: 8 to 64)"
    )
    parser.add_argument("--accumulate", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trainers", nargs="*", default=["gpt_dist", "transformers", "litgpt"])
    parser.add_argument("--peers-python", help="interpreter that has litgpt installed")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--eager", action="store_true", help="do not compile the peers")
    parser.add_argument("--verbose", action="store_true", help="show what the trainers print")
    parser.add_argument("--json", help="JSON file to write")
    parser.add_argument("--picture", help="PNG file to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    micro_batches = args.micro_batch or ([8, 16, 32, 64] if args.device == "cuda" else [4])
    names = [n for n in args.trainers if n != "litgpt" or args.peers_python]
    with torch.device("meta"):
        model = GPT(ModelConfig(**SHAPES[args.shape], vocab_size=50257))
    flops = model.flops_per_token(args.context)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        data = Path(scratch) / "tokens.pt"
        torch.save(torch.randint(50257, (512, args.context + 1)), data)
        for micro_batch in micro_batches:
            settings = {
                "shape": SHAPES[args.shape],
                "context": args.context,
                "micro_batch": micro_batch,
                "lr": 1e-4,
                "device": args.device,
                "threads": args.threads,
                "compile": not args.eager,
                "tokens": str(data),
                "verbose": args.verbose,
            }
            trainers = [
                Trainer(n, args.peers_python if n == "litgpt" else sys.executable, settings)
                for n in names
            ]
            try:
                for trainer in trainers:  # compile and settle, one after the other
                    trainer.run(1, 3)
                # Ascending: a process keeps what it freed, and peaks are to be those of a setting.
                for accumulate in sorted(args.accumulate):
                    steps = max(1, 6 // accumulate) * (5 if args.device == "cuda" else 1)
                    peak = matmul_flops(device, 4096), matmul_flops(device, 1024)
                    tokens = micro_batch * args.context
                    found = measure(trainers, accumulate, args.rounds, steps, tokens)
                    peak = max(*peak, matmul_flops(device, 4096))
                    results.append(
                        {
                            "micro_batch": micro_batch,
                            "accumulate": accumulate,
                            "matmul_gflops": peak / 1e9,
                            "trainers": found,
                        }
                    )
                    report(results[-1], flops, peak)
            finally:
                for trainer in trainers:
                    trainer.close()
    document = {
        "shape": args.shape,
        "context": args.context,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        "flops_per_token": flops,
        "left_out": sorted(set(args.trainers) - set(names)),
        "results": results,
    }
    peers = {"litgpt": version_in(args.peers_python, "litgpt")} if "litgpt" in names else {}
    record(args.json, document, tuple(n for n in names if n == "transformers"), peers)
    if args.picture:
        draw(results, args.picture)


def report(result: dict[str, Any], flops: float, peak: float) -> None:
    """Print one comparison; adds the share of the peak and the ratio to the best peer."""
    found = result["trainers"]
    peers = [v["tokens_per_second"] for n, v in found.items() if n != "gpt_dist"]
    print(
        f"micro-batch {result['micro_batch']}, {result['accumulate']} a step; "
        f"bf16 matmul peak {peak / 1e9:.0f} GFLOP/s"
    )
    for name, values in found.items():
        values["of_peak"] = values["tokens_per_second"] * flops / peak
        print(
            f"  {name:<14}{values['tokens_per_second']:>9.0f} tokens/s "
            f"({values['lowest']:.0f} to {values['highest']:.0f})  "
            f"{values['of_peak']:.1%} of peak  {values['peak_gb']:.2f} GB"
        )
    if peers and "gpt_dist" in found:
        result["ratio_to_best_peer"] = found["gpt_dist"]["tokens_per_second"] / max(peers)
        print(f"  {result['ratio_to_best_peer']:.2f}x the best peer")
    sys.stdout.flush()


def draw(results: list[dict[str, Any]], path: str) -> None:
    """Bars of tokens per second, a group for each setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names = list(results[0]["trainers"])
    for number, name in enumerate(names):
        places = [group + number / (len(names) + 1) for group in range(len(results))]
        values = [r["trainers"][name] for r in results]
        middle = [v["tokens_per_second"] for v in values]
        spread = [
            [m - v["lowest"] for m, v in zip(middle, values, strict=True)],
            [v["highest"] - m for m, v in zip(middle, values, strict=True)],
        ]
        width = 1 / (len(names) + 1)
        axes.bar(places, middle, width=width, yerr=spread, label=name, capsize=3)
    labels = [f"{r['micro_batch']} sequences\nx {r['accumulate']} a step" for r in results]
    axes.set_xticks([g + (len(names) - 1) / 2 / (len(names) + 1) for g in range(len(results))])
    axes.set_xticklabels(labels)
    axes.set_ylabel("tokens per second")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
