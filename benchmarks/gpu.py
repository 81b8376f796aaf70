"""Correctness and speed on one GPU.

    python benchmarks/gpu.py losses       # 50 training steps: fp32, bf16, bf16 compiled
    python benchmarks/gpu.py resume       # a stopped and resumed run against one that ran through
    python benchmarks/gpu.py strategies   # DDP and ZeRO 1 to 3, one rank
    python benchmarks/gpu.py operations   # each operation against float64
    python benchmarks/gpu.py greedy       # greedy tokens against an uncached forward pass
    python benchmarks/gpu.py decoding     # tokens/s and latency at batch 1, 8, 64 and 256
    python benchmarks/gpu.py server       # 64 streams over gRPC

Each part prints the most expensive kernels of a profile, and writes its record as soon as it has
it. ``--device cpu --shape tiny`` runs the same on any machine. ``gpu_suite.sh`` runs all parts.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from busiest import busiest, profiled, show
from flags import as_flags, benchmark_parser
from record import record
from torch.nn import functional as F

from gpt_dist import ops
from gpt_dist.config.settings import ModelConfig
from gpt_dist.data.shards import write_shard
from gpt_dist.errors import GptDistError, run_main
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate_many
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from gpt_dist.ops import cross_entropy
from gpt_dist.text.bundled import shakespeare
from gpt_dist.text.tokenizers import load_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64},
}


def write_shakespeare(out: Path) -> None:
    """The bundled Shakespeare as GPT-2 tokens; ``gpt_dist.prepare`` would need pyarrow."""
    tokens = np.array(load_tokenizer("gpt2").encode(shakespeare()), np.uint16)
    out.mkdir()
    write_shard(out / "x_train_000000.bin", tokens[4096:])
    write_shard(out / "x_val_000000.bin", tokens[:4096])


def train(
    directory: Path, arguments: argparse.Namespace, name: str, *flags: str
) -> list[dict[str, Any]]:
    """Train on the bundled Shakespeare in ``directory``/``name``; the rows of its metrics."""
    data = directory / "data"
    if not data.exists():
        write_shakespeare(data)
    shape = SHAPES[arguments.shape]
    sequences = 32 if arguments.device == "cuda" else 2  # the CPU run only tests this script
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
    out = directory / name
    command = [sys.executable, "-m", "gpt_dist.train", "--out_dir", str(out)]
    command += [*as_flags(settings), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GptDistError(f"training failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    trace = out / "profile" / "trace.json"
    if trace.exists():
        show(busiest(trace), name)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same steps in fp32, in bf16, compiled, and with a bf16 residual stream."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for label, precision, compiled, residual in (
            ("fp32", "fp32", "false", "fp32"),
            ("bf16", "bf16", "false", "fp32"),
            ("bf16-compiled", "bf16", "true", "fp32"),
            ("bf16-residual", "bf16", "true", "bf16"),
        ):
            rows = train(
                Path(name), arguments, label, "--train.steps", str(arguments.steps),
                "--train.precision", precision, "--train.compile", compiled,
                "--train.residual", residual, "--train.profile", "true",
            )  # fmt: skip
            found[label] = [row["train_loss"] for row in rows]
    worst = {
        label: max(abs(a - b) / b for a, b in zip(values, found["fp32"], strict=True))
        for label, values in found.items()
    }
    for step in range(0, arguments.steps, 7):
        print(f"step {step + 1:3d}  " + "  ".join(f"{n} {v[step]:.4f}" for n, v in found.items()))
    return {"losses": found, "largest_relative_difference_to_fp32": worst}


def resume(arguments: argparse.Namespace) -> dict[str, Any]:
    """30 steps in one run, and 15 steps resumed to 30."""
    with tempfile.TemporaryDirectory() as name:
        whole = train(
            Path(name), arguments, "whole", "--train.steps", "30", "--train.profile", "true"
        )
        for steps in ("15", "30"):
            parts = train(Path(name), arguments, "parts", "--train.steps", steps)
    return difference(whole, parts)


def strategies(arguments: argparse.Namespace) -> dict[str, Any]:
    """20 steps with DeepSpeed's ZeRO beside those of DDP."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        flags = ["--train.steps", "20", "--train.profile", "true"]
        whole = train(Path(name), arguments, "ddp", *flags)
        for stage in (1, 2, 3):
            zero = ["--parallel.strategy", "deepspeed", "--parallel.zero_stage", str(stage)]
            try:
                rows = train(Path(name), arguments, f"zero-{stage}", *flags, *zero)
                found[f"zero-{stage}"] = difference(whole, rows)
            except GptDistError as error:  # the others may work
                found[f"zero-{stage}"] = {"failed": str(error)[-300:]}
    return found


def difference(whole: list[dict[str, Any]], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """How the losses of two runs differ."""
    a, b = ([row["train_loss"] for row in rows] for rows in (whole, parts))
    return {
        "steps": len(b),
        "equal_losses": sum(x == y for x, y in zip(a, b, strict=True)),
        "largest_relative_difference": max(abs(x - y) / x for x, y in zip(a, b, strict=True)),
    }


def operations(arguments: argparse.Namespace) -> dict[str, Any]:
    """Largest error of each operation's result and gradients in bf16, relative to float64's."""
    torch.manual_seed(0)
    device, rows, width = arguments.device, 64, 128
    x = torch.randn(rows, width, device=device)
    norm, bias = torch.randn(2, width, device=device)
    qkv = torch.randn(2, 32, 3 * width, device=device)
    square = torch.randn(width, width, device=device)
    calls: dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = {
        "attention": (lambda a: ops.attention(a, 4), [qkv]),
        "gelu": (ops.gelu, [x]),
        "layer_norm": (ops.layer_norm, [x, norm, bias]),
        "linear": (ops.linear, [x, square, bias]),
        "add": (ops.add, [x, square[:rows]]),
    }
    found = {}
    for name, (call, inputs) in calls.items():
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            leaves = [t.to(torch.bfloat16).to(dtype).requires_grad_() for t in inputs]
            y = call(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
        found[name] = max(
            float(
                (low.detach().double() - exact.detach()).norm()
                / exact.detach().norm().clamp(min=1e-9)
            )
            for exact, low in zip(*results, strict=True)
        )
    for vocabulary in (50257, 65, 4096):
        padded = -(-vocabulary // 128) * 128
        logits = torch.randn(rows, padded, device=device).bfloat16()
        targets = torch.randint(vocabulary, (rows,), device=device)
        targets[0] = -1
        exact = logits[:, :vocabulary].double().requires_grad_()
        wanted = F.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
        (slopes,) = torch.autograd.grad(wanted.sum(), exact)
        losses = cross_entropy.cross_entropy_(logits, targets, vocabulary)
        off = (losses.double() - wanted.detach()).abs().max()
        spread = (logits[:, :vocabulary].double() - slopes).norm() / slopes.norm()
        found[f"cross_entropy {vocabulary}"] = max(float(off), float(spread))
    weight = torch.zeros(width, width, device=device)
    cross_entropy.add_product_(weight, x.bfloat16(), x.bfloat16(), True)
    cross_entropy.add_product_(weight, x.bfloat16(), x.bfloat16(), False)
    exact = 2 * x.bfloat16().double().t() @ x.bfloat16().double()
    found["add_product"] = float((weight - exact).norm() / exact.norm())
    show(profiled(lambda: ops.attention(qkv, 4), device), "attention")
    return {"largest_relative_error": found, "passed": all(v < 2e-2 for v in found.values())}


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
    decoder.prefill(0, prompts[0][:-1])
    decoder.activate(0, sampling[0], prompts[0])
    show(profiled(decoder.step, arguments.device), "a decoding step in fp32")
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
    """64 + 128 tokens per sequence; at the limit a step reads each weight and cached key once.

    The time between two tokens is that of ``Decoder.step`` alone, without the prompts.
    """
    model = random_model(arguments)
    dtype = "bf16" if arguments.device == "cuda" else "auto"
    limit = bandwidth(arguments.device)
    found: dict[str, Any] = {"bandwidth_gb_per_second": limit / 1e9}
    for batch in arguments.batches:
        decoder = Decoder(model, max_slots=batch, device=arguments.device, dtype=dtype)
        seconds, new = [], 128
        for slot in range(batch):
            prompt = torch.randint(50257, (64,)).tolist()
            decoder.prefill(slot, prompt[:-1])
            decoder.activate(slot, SamplingParams(top_k=50, seed=slot), prompt)
        for _ in range(new - 8):
            began = time.perf_counter()
            decoder.step()
            seconds.append(time.perf_counter() - began)
        kernels = profiled(functools.partial(steps_of, decoder, 8), arguments.device)
        show(kernels, f"decoding at batch {batch}")
        ordered = sorted(seconds[8:])
        median = statistics.median(ordered)
        itemsize = {"fp32": 4, "bf16": 2, "int8": 1}[decoder.dtype]
        config = model.config
        read = model.num_parameters(embeddings=False) * itemsize
        cached = 2 * config.n_layer * config.n_embd * (64 + new / 2) * batch * itemsize
        bound = batch * limit / (read + cached)
        found[f"batch_{batch}"] = {
            "dtype": decoder.dtype,
            "tokens_per_second": batch / median,
            "ms_between_tokens": {
                "median": 1e3 * median,
                "p99": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
                "highest": 1e3 * ordered[-1],
            },
            "of_the_bandwidth_limit": batch / median / bound,
            "kernels": kernels,
        }
        keep(arguments, found)
    return found


def steps_of(decoder: Decoder, count: int) -> None:
    for _ in range(count):
        decoder.step()


def server(arguments: argparse.Namespace) -> dict[str, Any]:
    """Streams over gRPC, by the load generator that comes with the server."""
    streams = 64 if arguments.device == "cuda" else 4
    with tempfile.TemporaryDirectory() as name:
        train(Path(name), arguments, "run", "--train.steps", "12")
        log = Path(name) / "log"
        command = [sys.executable, "-m", "serve", "--checkpoint", f"{name}/run", "--port", "0"]
        command += ["--device", arguments.device, "--max-slots", str(streams)]
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            target = listening(log, process)
            load = [sys.executable, "-m", "serve.bench", "--target", target]
            load += ["--concurrency", str(streams), "--requests", str(4 * streams)]
            load += ["--json", f"{name}/bench.json"]
            subprocess.run(load, check=True)
            found: dict[str, Any] = json.loads((Path(name) / "bench.json").read_text())
        finally:
            process.terminate()
            process.wait()
    return {"streams": streams, "bench": found}


def listening(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Where a server that was started serves, once it does."""
    while True:
        found = re.search(r"(127\.0\.0\.1:\d+)", log.read_text())
        if found and "ready" in log.read_text().lower():
            return found[1]
        if process.poll() is not None:
            raise GptDistError(f"the server ended:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


def keep(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the record of a part, or of what it has so far."""
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    record(arguments.json, {"part": arguments.part, "device": device, **result})


def without(result: Any, keys: tuple[str, ...]) -> Any:
    """A result without some keys, at any depth."""
    if not isinstance(result, dict):
        return result
    return {key: without(value, keys) for key, value in result.items() if key not in keys}


def main() -> None:
    functions = (losses, resume, strategies, operations, greedy, decoding, server)
    parts = {part.__name__: part for part in functions}
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="124m")
    parser.add_argument(
        "--context", type=int, default=1024, help="context length, 192 or more (1024)"
    )
    parser.add_argument("--steps", type=int, default=50, help="of losses (50)")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 8, 64, 256], help="of decoding"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise GptDistError("no GPU found; --device cpu --shape tiny runs the same without one")
    result = parts[arguments.part](arguments)
    print(json.dumps(without(result, ("losses", "kernels")), indent=1))
    keep(arguments, result)


if __name__ == "__main__":
    run_main(main)
