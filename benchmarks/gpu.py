"""Correctness and decoding speed on one GPU.

    python benchmarks/gpu.py losses     # 50 training steps: fp32, bf16, bf16 compiled
    python benchmarks/gpu.py resume     # a stopped and resumed run against one that ran through
    python benchmarks/gpu.py greedy     # greedy tokens against an uncached forward pass
    python benchmarks/gpu.py decoding   # tokens/s at batch 1 and 64, share of the bandwidth limit

``--device cpu --shape tiny`` runs the same on any machine. ``gpu_suite.sh`` runs all parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flags import as_flags, benchmark_parser, prepare_shakespeare
from record import record
from training import SHAPES

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, run_main
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate_many
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT


def train(directory: Path, arguments: argparse.Namespace, *flags: str) -> list[dict[str, Any]]:
    """Train on the bundled Shakespeare; the rows of its metrics."""
    data = directory / "data"
    if not data.exists():
        prepare_shakespeare(data, "gpt2")
    shape = SHAPES[arguments.shape]
    sequences = 32 if arguments.device == "cuda" else 4  # the CPU run only tests this script
    settings = {
        "device": arguments.device,
        "data.path": data,
        "data.stride": 64,
        "model.context_length": arguments.context,
        "train.batch_tokens": sequences * arguments.context,
        "train.micro_batch_size": sequences // 2,
        "optim.warmup_steps": 10,
        "optim.schedule": "constant",
        "train.eval_every": 0,
        "train.sample_every": 0,
        "train.checkpoint_every": 0,
        **{f"model.{key}": value for key, value in shape.items()},
    }
    command = [sys.executable, "-m", "gpt_dist.train", *flags, *as_flags(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GptDistError(f"training failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    out = Path(flags[flags.index("--out_dir") + 1])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same 50 steps in fp32, in bf16 and in compiled bf16."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for label, precision, compiled in (
            ("fp32", "fp32", "false"),
            ("bf16", "bf16", "false"),
            ("bf16 compiled", "bf16", "true"),
        ):
            rows = train(
                Path(name), arguments, "--out_dir", f"{name}/{label}", "--train.steps", "50",
                "--train.precision", precision, "--train.compile", compiled,
            )  # fmt: skip
            found[label] = [row["train_loss"] for row in rows]
    worst = {
        label: max(abs(a - b) / b for a, b in zip(values, found["fp32"], strict=True))
        for label, values in found.items()
    }
    for step in range(0, 50, 7):
        print(f"step {step + 1:3d}  " + "  ".join(f"{n} {v[step]:.4f}" for n, v in found.items()))
    return {"losses": found, "largest_relative_difference_to_fp32": worst}


def resume(arguments: argparse.Namespace) -> dict[str, Any]:
    """30 steps in one run, and 15 steps resumed to 30."""
    with tempfile.TemporaryDirectory() as name:
        whole = train(Path(name), arguments, "--out_dir", f"{name}/whole", "--train.steps", "30")
        for steps in ("15", "30"):
            flags = ("--out_dir", f"{name}/parts", "--train.steps", steps)
            parts = train(Path(name), arguments, *flags)
    a, b = ([row["train_loss"] for row in rows] for rows in (whole, parts))
    return {
        "steps": len(b),
        "equal_losses": sum(x == y for x, y in zip(a, b, strict=True)),
        "largest_relative_difference": max(
            abs(x - y) / x for x, y in zip(a, b, strict=True)
        ),
    }  # fmt: skip


def random_model(arguments: argparse.Namespace) -> GPT:
    torch.manual_seed(0)
    shape = SHAPES[arguments.shape]
    config = ModelConfig(**shape, vocab_size=50257, context_length=arguments.context)
    return GPT(config).eval().to(arguments.device)


def greedy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Eight prompts in one batch in fp32; how far each chosen logit is below the best one."""
    torch.set_float32_matmul_precision("highest")
    model = random_model(arguments)
    decoder = Decoder(model, max_slots=8, device=arguments.device, dtype="fp32")
    prompts = [torch.randint(50257, (length,)).tolist() for length in range(3, 67, 8)]
    made: dict[int, list[int]] = {number: [] for number in range(8)}
    sampling = [SamplingParams(temperature=0.0) for _ in prompts]
    for number, token in generate_many(decoder, prompts, sampling, 32):
        made[number].append(token)
    gaps = []
    for number, tokens in made.items():
        ids = torch.tensor([prompts[number] + tokens], device=arguments.device)
        with torch.inference_mode():
            logits = model(ids)[0, len(prompts[number]) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompts[number]) :, None])[:, 0]
        gaps += (logits.amax(1) - chosen).tolist()
    return {"tokens": len(gaps), "largest_gap_to_the_best_logit": max(gaps)}


def bandwidth(device: str) -> float:
    """Memory bandwidth in bytes/s: reads and writes of a large copy."""
    size = (4 << 30) if device == "cuda" else (256 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source), device)


def fastest(work: Callable[[], object], device: str) -> float:
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """64 + 128 tokens per sequence; at the limit a step reads each weight and cached key once."""
    model = random_model(arguments)
    dtype = "bf16" if arguments.device == "cuda" else "auto"
    limit = bandwidth(arguments.device)
    found: dict[str, Any] = {"bandwidth_gb_per_second": limit / 1e9}
    for batch in (1, 64):
        decoder = Decoder(model, max_slots=batch, device=arguments.device, dtype=dtype)
        speeds, new = [], 128
        for turn in range(4):
            prompts = [torch.randint(50257, (64,)).tolist() for _ in range(batch)]
            sampling = [SamplingParams(top_k=50, seed=turn) for _ in prompts]
            began = time.perf_counter()
            count = sum(1 for _ in generate_many(decoder, prompts, sampling, new))
            speeds.append(count / (time.perf_counter() - began))
        speed = statistics.median(speeds[1:])
        itemsize = {"fp32": 4, "bf16": 2, "int8": 1}[decoder.dtype]
        config = model.config
        read = model.num_parameters(embeddings=False) * itemsize
        cached = 2 * config.n_layer * config.n_embd * (64 + new / 2) * batch * itemsize
        bound = batch * limit / (read + cached)
        found[f"batch_{batch}"] = {
            "dtype": decoder.dtype,
            "tokens_per_second": speed,
            "runs": speeds[1:],
            "of_the_bandwidth_limit": speed / bound,
        }
    return found


def main() -> None:
    parts = {part.__name__: part for part in (losses, resume, greedy, decoding)}
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="124m")
    parser.add_argument(
        "--context", type=int, default=1024, help="context length, 192 or more (1024)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise GptDistError("no GPU found; --device cpu --shape tiny runs the same without one")
    result = parts[arguments.part](arguments)
    print(json.dumps({k: v for k, v in result.items() if k != "losses"}, indent=1))
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    record(arguments.json, {"part": arguments.part, "device": device, **result})


if __name__ == "__main__":
    run_main(main)
