"""``python -m serve.bench``: put load on a server and measure its latency and throughput."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from gpt_dist.errors import Parser, UsageError, at_least, run_main
from serve.client import AsyncClient, Prompt
from serve.client.connection import DEFAULT_TARGET, read_token
from serve.client.words import failure_of
from serve.requests import HttpClient, Record, ask

PERCENTILES = (50, 90, 99)
HTTP_VOCABULARY = 256
"""Random prompts over HTTP use this many ids: a server there does not say how many it has."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolate linearly between the closest ranks. NaN if there are no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Percentiles and mean of times in seconds, in milliseconds."""
    figures = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    figures["mean"] = sum(values) / len(values) if values else math.nan
    return {name: round(value * 1000, 3) for name, value in figures.items()}


def lengths(text: str) -> Callable[[random.Random], int]:
    """Parse a distribution of lengths: ``64``, ``uniform:16,128`` or ``normal:64,20``.

    Raises:
        argparse.ArgumentTypeError: the text is none of these.
    """
    kind, _, rest = text.partition(":")
    try:
        if not rest:
            fixed = int(kind)
            if fixed < 1:
                raise ValueError
            return lambda _: fixed
        low, high = (float(part) for part in rest.split(","))
    except ValueError:
        kind = ""
    if kind == "uniform" and 1 <= low <= high:
        return lambda draw: draw.randint(int(low), int(high))
    if kind == "normal" and low >= 1 and high >= 0:
        return lambda draw: max(1, round(draw.gauss(low, high)))
    raise argparse.ArgumentTypeError(f"{text}: must be like 64, uniform:16,128 or normal:64,20")


@dataclass(frozen=True)
class Load:
    """The requests, and how fast they are sent."""

    requests: int
    concurrency: int | None
    """Number of requests in flight, or None to use ``rate``."""
    rate: float | None
    """Requests per second, as a Poisson process."""
    prompts: list[Prompt]
    """Used in rotation."""
    new_tokens: list[int]
    """Maximum new tokens, one entry per request."""
    parameters: dict[str, Any]
    arrivals: list[float] | None = None
    """When each request is sent, in seconds from the start; None to use one of the others."""


async def run(
    target: str, load: Load, seed: int, done: Callable[[], None] = lambda: None, **options: Any
) -> tuple[list[Record], float]:
    """Apply a load; returns a record per request, and the duration in seconds.

    Args:
        target: the server.
        load: the requests.
        seed: for the arrival times.
        done: called after each request.
        options: arguments of `AsyncClient`.
    """
    async with AsyncClient(target, **options) as client:
        await client.info()  # connects
        return await apply(load, seed, partial(ask, client), done)


async def apply(
    load: Load,
    seed: int,
    measure: Callable[[Prompt, int, dict[str, Any]], Awaitable[Record]],
    done: Callable[[], None] = lambda: None,
) -> tuple[list[Record], float]:
    """As `run`; ``measure`` makes one request: prompt, new tokens and parameters."""
    draw = random.Random(seed)
    records: list[Record] = []

    async def one(index: int) -> None:
        prompt = load.prompts[index % len(load.prompts)]
        records.append(await measure(prompt, load.new_tokens[index], load.parameters))
        done()

    async def at(seconds: float, index: int) -> None:
        await asyncio.sleep(began + seconds - time.perf_counter())
        await one(index)

    began = time.perf_counter()
    if load.arrivals is not None:
        await asyncio.gather(*[at(when, index) for index, when in enumerate(load.arrivals)])
    elif load.rate is not None:
        tasks = []
        for index in range(load.requests):
            tasks.append(asyncio.create_task(one(index)))
            await asyncio.sleep(draw.expovariate(load.rate))
        await asyncio.gather(*tasks)
    else:
        order = iter(range(load.requests))

        async def worker() -> None:
            for index in order:
                await one(index)

        await asyncio.gather(*[worker() for _ in range(load.concurrency or 1)])
    return records, time.perf_counter() - began


def report(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    """Summarise the records of a run that took ``seconds``."""
    good = [record for record in records if not record.error]
    tokens = sum(record.tokens for record in records)
    return {
        "requests": len(records),
        "completed": len(good),
        "errors": dict(Counter(record.error for record in records if record.error)),
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "requests_per_second": round(len(good) / seconds, 2),
        "time_to_first_token_ms": summary([record.first for record in good]),
        "inter_token_ms": summary([gap for record in good for gap in record.gaps]),
        "end_to_end_ms": summary([record.total for record in good]),
    }


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the distributions of the three latencies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [record for record in records if not record.error]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), constrained_layout=True)
    for axis, title, values in zip(
        axes,
        ("time to first token", "between tokens", "end to end"),
        (
            [record.first for record in good],
            [gap for record in good for gap in record.gaps],
            [record.total for record in good],
        ),
        strict=True,
    ):
        ordered = sorted(value * 1000 for value in values)
        axis.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post")
        axis.set(title=title, xlabel="ms", ylabel="share of requests or tokens", ylim=(0, 1.02))
        for percent in PERCENTILES:
            axis.axhline(percent / 100, color="0.85", zorder=0)
        axis.set_xlim(left=0)
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="python -m serve.bench",
        description="Send streamed requests to a server and measure latency and throughput.",
        epilog="""examples:
  python -m serve.bench --concurrency 32 --requests 128
  python -m serve.bench --rate 5 --prompt-tokens uniform:16,512 --new-tokens normal:64,20
  python -m serve.bench --trace arrivals.jsonl
  python -m serve.bench --http http://127.0.0.1:8000/v1 --concurrency 8
  python -m serve.bench --prompts questions.txt --json result.json --plot result.png""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--target", default=DEFAULT_TARGET, help="default %(default)s")
    made.add_argument(
        "--http", metavar="URL", help="speak OpenAI's HTTP instead, to a server at this base URL"
    )
    made.add_argument("--model", default="gpt2", help="name of the model, for --http")
    made.add_argument("--token", help="bearer token (GPT_DIST_TOKEN)")
    made.add_argument("--token-file", type=Path, metavar="FILE", help="file with the bearer token")
    made.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="certificate authorities to trust (PEM)"
    )
    made.add_argument(
        "--timeout",
        type=at_least(0.001, float),
        default=300,
        metavar="SECONDS",
        help="deadline of a request, default %(default)g",
    )
    shape = made.add_mutually_exclusive_group()
    shape.add_argument(
        "--concurrency", type=at_least(1, int), metavar="N", help="requests in flight; default 8"
    )
    shape.add_argument(
        "--rate",
        type=at_least(0.001, float),
        metavar="N",
        help="requests per second, as a Poisson process",
    )
    shape.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="replay arrivals: a JSON object a line, with at (seconds), new_tokens, and prompt or "
        "prompt_tokens",
    )  # fmt: skip
    made.add_argument(
        "--requests", type=at_least(1, int), default=64, metavar="N", help="default %(default)s"
    )
    made.add_argument(
        "--prompt-tokens", type=lengths, default=lengths("64"), metavar="LENGTHS",
        help="length of random prompts: 64, uniform:16,128 or normal:64,20; default 64",
    )  # fmt: skip
    made.add_argument(
        "--prompts", type=Path, metavar="FILE", help="read prompts instead, one per line"
    )
    made.add_argument(
        "--new-tokens", type=lengths, default=lengths("64"), metavar="LENGTHS",
        help="tokens to generate, in the same notation; default 64",
    )  # fmt: skip
    made.add_argument("--temperature", type=float, default=1.0, metavar="X")
    made.add_argument("--top-k", type=int, default=50, metavar="N", help="default %(default)s")
    made.add_argument("--seed", type=int, default=0, help="for lengths, prompts and arrival times")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw the distributions as PNG")
    return made


def read_trace(path: Path, vocab_size: int, draw: random.Random) -> Load:
    """A load from a file of arrivals, one JSON object a line.

    Raises:
        UsageError: a line is not valid.
    """
    rows: list[tuple[float, Prompt, int]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            at, count = float(row["at"]), int(row["new_tokens"])
            prompt: Prompt = (
                str(row["prompt"])
                if "prompt" in row
                else [draw.randrange(vocab_size) for _ in range(int(row["prompt_tokens"]))]
            )
            if not (0 <= at < math.inf and count > 0 and prompt):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"--trace {path}, line {number}: must be like "
                '{"at": 0.5, "prompt_tokens": 64, "new_tokens": 32}, or have prompt'
            ) from None
        rows.append((at, prompt, count))
    if not rows:
        raise UsageError(f"--trace {path}: contains no request")
    arrivals, prompts, counts = (list(column) for column in zip(*rows, strict=True))
    return Load(len(rows), None, None, prompts, counts, {}, arrivals)


def _load(arguments: argparse.Namespace, vocab_size: int) -> Load:
    draw = random.Random(arguments.seed)
    parameters = {"temperature": arguments.temperature, "top_k": arguments.top_k}
    if arguments.trace is not None:
        return replace(read_trace(arguments.trace, vocab_size, draw), parameters=parameters)
    if arguments.prompts is not None:
        try:
            text = arguments.prompts.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"--prompts {arguments.prompts}: not UTF-8: byte {error.start:,}"
            ) from None
        prompts: list[Prompt] = [line for line in text.splitlines() if line]
        if not prompts:
            raise UsageError(f"--prompts {arguments.prompts}: contains no line of text")
    else:
        prompts = [
            [draw.randrange(vocab_size) for _ in range(arguments.prompt_tokens(draw))]
            for _ in range(arguments.requests)
        ]
    return Load(
        requests=arguments.requests,
        concurrency=None if arguments.rate else (arguments.concurrency or 8),
        rate=arguments.rate,
        prompts=prompts,
        new_tokens=[arguments.new_tokens(draw) for _ in range(arguments.requests)],
        parameters=parameters,
    )


def main() -> int:
    """Run the load, print the results and write them."""
    made = parser()
    arguments = made.parse_args()
    for flag, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{flag} {path}: no such directory: {path.parent}")
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    options = {
        name: getattr(arguments, name) for name in ("token", "token_file", "tls_ca", "timeout")
    }

    async def over_http() -> tuple[list[Record], float, Any, Any]:
        ca = arguments.tls_ca and str(arguments.tls_ca)
        token = arguments.token or read_token(arguments.token_file)
        made = HttpClient(arguments.http, arguments.model, token, ca, arguments.timeout)
        load = _load(arguments, HTTP_VOCABULARY)
        async with made as client:
            records, seconds = await apply(load, arguments.seed, client.ask)
        return records, seconds, None, None

    async def whole() -> tuple[list[Record], float, Any, Any]:
        async with AsyncClient(arguments.target, **options) as client:
            info, status = await client.info(), await client.status()
        load = _load(arguments, info.vocab_size)
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("requests", total=load.requests)
            records, seconds = await run(
                arguments.target, load, arguments.seed,
                lambda: progress.advance(task), **options,
            )  # fmt: skip
        return records, seconds, info, status

    try:
        records, seconds, info, status = asyncio.run(over_http() if arguments.http else whole())
    except grpc.aio.AioRpcError as error:
        raise failure_of(error, arguments) from None
    figures = report(records, seconds)
    table = Table("ms", *(f"p{percent}" for percent in PERCENTILES), "mean")
    for name in ("time_to_first_token_ms", "inter_token_ms", "end_to_end_ms"):
        values = [f"{value:.1f}" for value in figures[name].values()]
        table.add_row(name.removesuffix("_ms").replace("_", " "), *values)
    console = Console()
    console.print(table)
    console.print(
        f"{figures['tokens_per_second']:,} tokens/s, {figures['requests_per_second']} requests/s, "
        f"{figures['completed']} of {figures['requests']} completed, errors {figures['errors']}"
    )
    if arguments.json is not None:
        settings = {
            name: str(value) for name, value in vars(arguments).items()
            if name not in ("token", "prompt_tokens", "new_tokens")
        }  # fmt: skip
        names = ("name", "dtype", "device", "backend", "weights_version")
        model = {"url": arguments.http}
        if info is not None:
            model = {name: getattr(info, name) for name in names} | {"max_slots": status.max_slots}
        whole_report = {
            "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
            "settings": settings, "server": model, **figures,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(whole_report, indent=1) + "\n")
    if arguments.plot is not None:
        plot(records, arguments.plot)
    return 1 if figures["completed"] == 0 else 0


if __name__ == "__main__":
    run_main(main)
