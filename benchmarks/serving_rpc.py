"""The cost of gRPC, of the scheduler and of overload, on random GPT-2 124M weights.

    python benchmarks/serving_rpc.py share --json benchmarks/results/serving_share.json
    python benchmarks/serving_rpc.py stall | overload | flood | start

share     tokens/s of 32 streams through gRPC (server and client in separate processes), compared
          with direct calls of the decoder, in alternation
stall     the longest pause of running streams when a prompt of 900 tokens joins, compared with the
          time for a chunk
overload  ten times the capacity: time to a rejection in the server, memory, completed requests
flood     health checks and two streams while 50 connections send large requests to every method
start     seconds from the command to its ready line
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from flood import CONNECTIONS, watched
from record import record

from gpt_dist.checkpoints.writer import write_checkpoint
from gpt_dist.config.settings import ModelConfig
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate_many
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import load_tokenizer
from serve import bench
from serve.client import AsyncClient, Client

VOCABULARY = 50257


def random_model() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(vocab_size=VOCABULARY)).eval()


def write_model(directory: Path, model: GPT) -> None:
    """A checkpoint with these weights."""
    tensors = {
        f"model.{name}": (tensor[:VOCABULARY] if name == "wte.weight" else tensor).detach()
        for name, tensor in model.named_parameters()
    }
    state = {"step": 0, "config": {"model": model.config.model_dump()}}
    write_checkpoint(directory, tensors, state, load_tokenizer("gpt2"))


@contextmanager
def server(directory: Path, *flags: str, log: Path | None = None) -> Iterator[tuple[str, int]]:
    """Run a server process; yields its address and process id."""
    with (log or Path(os.devnull)).open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", "--checkpoint", str(directory), "--port", "0", *flags],
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        address = next(line for line in process.stdout if line.startswith("ready")).split()[1]
        try:
            yield address, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCABULARY) for _ in range(length)] for _ in range(count)]


def share(directory: Path, model: GPT, arguments: argparse.Namespace) -> dict[str, Any]:
    """32 streams of 64 + 64 tokens, top-k 50."""
    streams, new = 32, 64
    decoder = Decoder(model, max_slots=streams, dtype=arguments.dtype)
    sampling = [SamplingParams(top_k=50, seed=seed) for seed in range(streams)]
    direct, through = [], []
    with server(directory, "--dtype", arguments.dtype, "--log-level", "warning") as (address, _):
        for turn in range(arguments.rounds + 1):
            asked = prompts(streams, 64, turn)
            began = time.perf_counter()
            made = sum(1 for _ in generate_many(decoder, asked, sampling, new))
            direct.append(made / (time.perf_counter() - began))
            # Run the load generator in its own process, as users would.
            command = [
                sys.executable, "-m", "serve.bench", "--target", address, "--concurrency",
                str(streams), "--requests", str(streams), "--prompt-tokens", "64",
                "--new-tokens", str(new), "--seed", str(1000 + turn), "--json", "/dev/stdout",
            ]  # fmt: skip
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            figures = json.loads(output[output.index("{\n") :])
            assert figures["completed"] == streams, figures
            through.append(figures["tokens_per_second"])
            print(f"direct {direct[-1]:.0f} tokens/s, through gRPC {through[-1]:.0f}", flush=True)
    direct, through = direct[1:], through[1:]  # the first round warms up
    ratios = [b / a for a, b in zip(direct, through, strict=True)]
    return {
        "dtype": decoder.dtype, "streams": streams, "prompt_tokens": 64, "new_tokens": new,
        "direct_tokens_per_second": direct, "grpc_tokens_per_second": through,
        "median_share": statistics.median(ratios), "shares": ratios,
        "last_run": {name: figures[name] for name in ("time_to_first_token_ms", "inter_token_ms")},
    }  # fmt: skip


def stall(directory: Path, model: GPT, arguments: argparse.Namespace) -> dict[str, Any]:
    """Eight running streams, joined by one prompt of 900 tokens after another."""
    decoder = Decoder(model, max_slots=1, dtype=arguments.dtype)
    ids = prompts(1, 900, 0)[0]

    def chunks() -> list[float]:
        """Seconds for each chunk of the prompt. Later chunks attend to more tokens."""
        times = []
        for start in range(0, len(ids), 256):
            began = time.perf_counter()
            decoder.prefill(0, ids[start : start + 256], start)
            times.append(time.perf_counter() - began)
        return times

    chunks()
    measured = [chunks() for _ in range(5)]
    chunk = max(statistics.median(times) for times in zip(*measured, strict=True))
    whole = statistics.median(sum(times) for times in measured)

    async def run(address: str) -> tuple[list[float], list[float], list[float]]:
        quiet: list[float] = []
        disturbed: list[float] = []
        firsts: list[float] = []
        joining = asyncio.Event()

        async def listen(client: AsyncClient, prompt: list[int]) -> None:
            last = None
            async for _ in client.stream(prompt, max_new_tokens=600, ignore_eos=True):
                now = time.perf_counter()
                if last is not None:
                    (disturbed if joining.is_set() else quiet).append(now - last)
                last = now

        async with AsyncClient(address) as client:
            listeners = [
                asyncio.create_task(listen(client, prompt)) for prompt in prompts(8, 16, 1)
            ]
            await asyncio.sleep(2)
            for prompt in prompts(6, 900, 2):
                joining.set()
                began = time.perf_counter()
                async for _ in client.stream(prompt, max_new_tokens=1):
                    firsts.append(time.perf_counter() - began)
                joining.clear()
                await asyncio.sleep(0.5)
            for listener in listeners:
                listener.cancel()
            await asyncio.gather(*listeners, return_exceptions=True)
        return quiet[8:], disturbed, firsts

    flags = (
        "--dtype", arguments.dtype, "--log-level", "warning", "--max-slots", "16",
        "--stream-interval", "0",
    )  # fmt: skip
    with server(directory, *flags) as (address, _):
        asyncio.run(run(address))
        quiet, disturbed, firsts = asyncio.run(run(address))
    step = statistics.median(quiet)
    return {
        "dtype": decoder.dtype, "running_streams": 8, "joining_prompt_tokens": 900,
        "chunk_tokens": 256, "slowest_chunk_ms": chunk * 1000, "whole_prompt_ms": whole * 1000,
        "gap_ms_undisturbed": bench.summary(quiet) | {"max": max(quiet) * 1000},
        "gap_ms_while_joining": bench.summary(disturbed) | {"max": max(disturbed) * 1000},
        "step_plus_chunk_ms": (step + chunk) * 1000,
        "time_to_first_token_of_the_joining_ms": statistics.median(firsts) * 1000,
    }  # fmt: skip


def overload(directory: Path, model: GPT, arguments: argparse.Namespace) -> dict[str, Any]:
    """160 clients, which retry about a second after a rejection, at a capacity of 8 + 8."""
    log = directory.parent / "log.jsonl"
    memory: list[float] = []
    counts: dict[str, int] = {}
    seen: list[float] = []

    async def worker(client: AsyncClient, until: float, draw: random.Random) -> None:
        while time.monotonic() < until:
            prompt = [draw.randrange(VOCABULARY) for _ in range(64)]
            began = time.perf_counter()
            try:
                answer = await client.generate(prompt, max_new_tokens=32, ignore_eos=True)
                assert answer.usage.completion_tokens == 32
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                seen.append(time.perf_counter() - began)
                await asyncio.sleep(draw.uniform(0.5, 1.5))
            counts[code] = counts.get(code, 0) + 1

    async def run(address: str, seconds: float) -> None:
        async with AsyncClient(address) as client:
            until = time.monotonic() + seconds
            draws = [random.Random(seed) for seed in range(160)]
            await asyncio.gather(*[worker(client, until, draw) for draw in draws])

    flags = (
        "--dtype", arguments.dtype, "--max-slots", "8", "--max-queue", "8",
        "--log-format", "json",
    )  # fmt: skip
    with server(directory, *flags, log=log) as (address, pid):
        asyncio.run(run(address, 5))
        counts.clear()
        seen.clear()
        skip = len(log.read_text().splitlines())
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(1):
                memory.append(psutil.Process(pid).memory_info().rss / 1e6)

        watcher = threading.Thread(target=watch)
        watcher.start()
        asyncio.run(run(address, arguments.seconds))
        stop.set()
        watcher.join()
        with Client(address) as client:
            status = client.status()
            left = status.running + status.waiting
    lines = [json.loads(line) for line in log.read_text().splitlines()[skip:]]
    refused = [line["ms"] / 1000 for line in lines if line.get("code") == "RESOURCE_EXHAUSTED"]
    return {
        "dtype": arguments.dtype, "capacity": 16, "clients": 160, "seconds": arguments.seconds,
        "calls": counts, "left_over": left,
        "server_side_rejection_ms": bench.summary(refused),
        "client_side_rejection_ms": bench.summary(seen),
        "server_memory_mb": {
            "first": memory[0], "last": memory[-1], "min": min(memory), "max": max(memory),
        },
    }  # fmt: skip


def flood(directory: Path, model: GPT, arguments: argparse.Namespace) -> dict[str, Any]:
    """4 MB requests, and the longest that are read, over each protocol, beside two streams."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    streams = prompts(2, 16, 1)
    flags = (
        "--dtype", arguments.dtype, "--log-level", "error", "--stream-interval", "0",
        "--http-port", str(port),
    )  # fmt: skip
    found: dict[str, Any] = {}
    with server(directory, *flags) as (address, pid):
        http = f"127.0.0.1:{port}"
        asyncio.run(watched(address, http, 3, streams))
        found["none"] = asyncio.run(watched(address, http, arguments.seconds / 2, streams))
        for protocol, target in (("grpc", address), ("http", http)):
            for size in arguments.sizes:
                command = [
                    sys.executable, str(Path(__file__).with_name("flood.py")), protocol, target,
                    "--bytes", str(size), "--seconds", str(arguments.seconds + 4),
                ]  # fmt: skip
                flooder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                assert flooder.stdout is not None
                assert flooder.stdout.readline() == "ready\n"
                time.sleep(2)
                name = f"{protocol}, {size:,} bytes"
                before = psutil.Process(pid).cpu_times()
                found[name] = asyncio.run(watched(address, http, arguments.seconds, streams))
                after = psutil.Process(pid).cpu_times()
                found[name]["server_cpu_s"] = sum(after[:2]) - sum(before[:2])
                found[name]["flood_ended"] = json.loads(flooder.communicate()[0])
                print(name, json.dumps(found[name]), flush=True)
    return {
        "dtype": arguments.dtype, "connections": CONNECTIONS, "seconds": arguments.seconds,
        "note": "The flood comes from a process with nice 10 on the same cores.", "floods": found,
    }  # fmt: skip


def start(directory: Path, model: GPT, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start-up time, with files in the page cache and the CPU kernels compiled."""
    times = []
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        with server(directory, "--dtype", arguments.dtype):
            times.append(time.perf_counter() - began)
        print(f"ready after {times[-1]:.2f} s", flush=True)
    return {"dtype": arguments.dtype, "seconds_to_ready": times, "median": statistics.median(times)}


def main() -> None:
    """Measure one part and record it."""
    parts = {part.__name__: part for part in (share, stall, overload, flood, start)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=parts)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=60, help="duration of the overload, and of each flood"
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[4_000_000], help="of the flood, in bytes"
    )
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    model = random_model()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        directory.mkdir()
        write_model(directory, model)
        results = parts[arguments.part](directory, model, arguments)
    print(json.dumps(results, indent=1))
    record(arguments.json, results, ("grpcio", "protobuf"))


if __name__ == "__main__":
    main()
