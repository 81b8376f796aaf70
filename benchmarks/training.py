"""Training speed against transformers and litgpt: same shape, batch, data and machine.

    python benchmarks/training.py --peers-python peers/bin/python --json results.json
    python benchmarks/training.py --shape shakespeare-char-cpu --accumulate 1 \\
        --trainers gpt_dist transformers transformers-eager-fp32
    python benchmarks/training.py --device cuda --context 1024

A peer is compiled and runs in the precision of ``--precision``; ``-eager`` and ``-fp32`` behind
its name say otherwise.

Each trainer runs in its own process (``peers.py``). The trainers take turns, A B C A B C, so that
other load on the machine affects all of them. litgpt needs its own environment (--peers-python).
Without it, or if --trainers does not name it, litgpt is left out and the record says so.
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
from busiest import show
from flags import benchmark_parser
from record import record, version_in

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt_dist.config.settings import ModelConfig
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.engine import pick_dtype
from gpt_dist.parallel.world import available_cpus

PEERS = Path(__file__).with_name("peers.py")
SHAPES: dict[str, dict[str, Any]] = {
    "124m": {
        "model": {"n_layer": 12, "n_head": 12, "n_embd": 768},
        "vocabulary": 50257, "context": 256, "micro_batch": 4,
    },
    "tiny": {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 64},
        "vocabulary": 50257, "context": 64, "micro_batch": 2,
    },
    "shakespeare-char-cpu": {
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "bias": False},
        "vocabulary": 65, "context": 64, "micro_batch": 12,
    },
    "shakespeare-char": {
        "model": {"n_layer": 6, "n_head": 6, "n_embd": 384, "bias": False},
        "vocabulary": 65, "context": 256, "micro_batch": 64,
    },
}  # fmt: skip
"""Presets without dropout, in the batches that a CPU trains them in."""

ROUND_SECONDS = 5.0
"""Length of a trainer's turn."""


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
            raise SystemExit(f"error: {self.name} exited; --verbose shows its output")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kernels(self) -> list[dict[str, Any]]:
        """The most expensive kernels of a step of one micro-batch."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps({"accumulate": 1, "steps": 1, "profile": True}), file=self.process.stdin)
        self.process.stdin.flush()
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        found: list[dict[str, Any]] = reply["kernels"]
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def matmul_flops(
    device: torch.device, dtype: torch.dtype, size: int, seconds: float = 1.0
) -> float:
    """The best FLOP/s of a square matrix product."""
    import time

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
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
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="124m")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--context", type=int, help="tokens of a sequence (by shape)")
    parser.add_argument(
        "--micro-batch",
        type=int,
        nargs="*",
        help="sequences per micro-batch (by shape; cuda: 8 to 64)",
    )
    parser.add_argument("--accumulate", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trainers", nargs="*", default=["gpt_dist", "transformers", "litgpt"])
    parser.add_argument("--peers-python", help="Python interpreter of an environment with litgpt")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--verbose", action="store_true", help="show the output of the trainers")
    parser.add_argument(
        "--kernels", action="store_true", help="print the most expensive kernels of a step"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument("--picture", metavar="FILE", help="draw the result here")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    dtype = pick_dtype(args.precision, device)
    shape = SHAPES[args.shape]
    context, vocabulary = args.context or shape["context"], shape["vocabulary"]
    default = [8, 16, 32, 64] if args.device == "cuda" else [shape["micro_batch"]]
    micro_batches = args.micro_batch or default
    names = [n for n in args.trainers if n != "litgpt" or args.peers_python]
    with torch.device("meta"):
        model = GPT(ModelConfig(**shape["model"], vocab_size=vocabulary))
    flops = model.flops_per_token(context)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        data = Path(scratch) / "tokens.pt"
        torch.save(torch.randint(vocabulary, (512, context + 1)), data)
        for micro_batch in micro_batches:
            settings = {
                "shape": shape["model"],
                "vocabulary": vocabulary,
                "context": context,
                "micro_batch": micro_batch,
                "lr": 1e-4,
                "device": args.device,
                "threads": args.threads,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": str(data),
                "verbose": args.verbose,
            }
            trainers = [
                Trainer(n, args.peers_python if n == "litgpt" else sys.executable, settings)
                for n in names
            ]
            try:
                # They compile one after the other; the last step shows what a step takes.
                slowest = max(trainer.run(1, 3)["seconds"][-1] for trainer in trainers)
                # Ascending: a process keeps freed memory, and each setting needs its own peak.
                for accumulate in sorted(args.accumulate):
                    steps = max(1, round(ROUND_SECONDS / (slowest * accumulate)))
                    peak = [matmul_flops(device, dtype, size) for size in (4096, 1024)]
                    tokens = micro_batch * context
                    found = measure(trainers, accumulate, args.rounds, steps, tokens)
                    best = max(*peak, matmul_flops(device, dtype, 4096))
                    results.append(
                        {
                            "micro_batch": micro_batch,
                            "accumulate": accumulate,
                            "matmul_gflops": best / 1e9,
                            "trainers": found,
                        }
                    )
                    report(results[-1], flops, best)
                    keep(args, results, dtype, context, flops, names)
                for trainer in trainers if args.kernels else []:
                    kernels = trainer.kernels()
                    results[-1]["trainers"][trainer.name]["kernels"] = kernels
                    show(kernels, f"{trainer.name}, micro-batch {micro_batch}")
            finally:
                for trainer in trainers:
                    trainer.close()
    document = keep(args, results, dtype, context, flops, names)
    if args.picture:
        import pictures  # matplotlib

        pictures.training(document, Path(args.picture))


def keep(
    args: argparse.Namespace, results: list[dict[str, Any]], dtype: torch.dtype, context: int,
    flops: float, names: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Write the record of what there is so far; returns it."""
    document = {
        "shape": args.shape,
        "context": context,
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        "flops_per_token": flops,
        "left_out": sorted(set(args.trainers) - set(names)),
        "results": results,
    }
    peers = {"litgpt": version_in(args.peers_python, "litgpt")} if "litgpt" in names else {}
    packages = ("transformers",) if any("transformers" in n for n in names) else ()
    record(args.json, document, packages, peers)
    return document


def report(result: dict[str, Any], flops: float, peak: float) -> None:
    """Print one comparison, after adding the share of the peak and the ratio to the best peer."""
    found = result["trainers"]
    peers = [v["tokens_per_second"] for n, v in found.items() if n != "gpt_dist"]
    print(
        f"micro-batch {result['micro_batch']}, {result['accumulate']} a step; "
        f"matmul peak {peak / 1e9:.0f} GFLOP/s"
    )
    for name, values in found.items():
        values["of_peak"] = values["tokens_per_second"] * flops / peak
        print(
            f"  {name:<24}{values['tokens_per_second']:>9.0f} tokens/s "
            f"({values['lowest']:.0f} to {values['highest']:.0f})  "
            f"{values['of_peak']:.1%} of peak  {values['peak_gb']:.2f} GB"
        )
    if peers and "gpt_dist" in found:
        result["ratio_to_best_peer"] = found["gpt_dist"]["tokens_per_second"] / max(peers)
        print(f"  {result['ratio_to_best_peer']:.2f}x the best peer")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
