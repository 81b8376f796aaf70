"""Data preparation (correct ids, determinism, speed, memory) and the speed of the loader.

    python benchmarks/data.py --text wikipedia.txt.gz --json benchmarks/results/data.json

Without --text it generates its own text. Each part repeats the text to the size it needs. Speeds
are medians of rounds in which both sides alternate. --memory-bytes 5G takes about ten minutes and
8 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
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
from data_texts import EOT, SEPARATOR, first, read_documents, reference, write_large, written_as
from flags import as_flags, benchmark_parser
from record import record

from gpt_dist import prepare
from gpt_dist.config.command_line import load
from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.loader import Loader
from gpt_dist.data.order import TrainingData
from gpt_dist.errors import UsageError, run_main


def main() -> int:
    args = parse()
    parts = {
        "equality": equality,
        "determinism": determinism,
        "throughput": throughput,
        "loader": loader,
        "memory": memory,
    }
    chosen = args.parts.split(",")
    if unknown := set(chosen) - set(parts):
        raise UsageError(f"--parts {', '.join(unknown)}: valid are {', '.join(parts)}")
    documents = read_documents(args.text)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for name in chosen:
            place = Path(scratch) / name
            place.mkdir()
            results[name] = parts[name](args, documents, place)
            results[name]["command"] = shlex.join(["python", *sys.argv])
            shutil.rmtree(place)
            print(flush=True)
    good = all(entry["good"] for entry in results.values())
    print("all checks passed" if good else "a check FAILED")
    if args.json and Path(args.json).exists():  # keep the parts measured earlier
        before = json.loads(Path(args.json).read_text())
        results = {name: before[name] for name in parts if name in before} | results
    record(args.json, results, ("tiktoken", "tokenizers", "numpy", "pyarrow"))
    return 0 if good else 1


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("--text", help="documents separated by <|endoftext|>, may be .gz")
    parser.add_argument("--parts", default="equality,determinism,throughput,loader,memory")
    parser.add_argument("--equality-bytes", type=size, default=20_000_000, metavar="N")
    parser.add_argument("--speed-bytes", type=size, default=50_000_000, metavar="N")
    parser.add_argument("--memory-bytes", type=size, default=5_000_000_000, metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", metavar="DIR", help="directory for temporary files")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    return parser.parse_args()


def size(text: str) -> int:
    """A number of bytes such as 50M."""
    match = re.fullmatch(r"([0-9.]+)([kMG]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 50M")
    return int(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]])


# --- text ----------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gpt_dist.prepare", *map(str, arguments)]


def run(*arguments: object) -> None:
    subprocess.run(command(*arguments), check=True, capture_output=True)


# --- the parts -----------------------------------------------------------------------------------


def equality(args: argparse.Namespace, documents: list[str], place: Path) -> dict[str, Any]:
    """Compare all ids with tiktoken's, document by document, for every kind of source."""
    print("ids equal to tiktoken's, document by document")
    kinds, good = {}, True
    for kind, (arguments, texts) in written_as(
        first(documents, args.equality_bytes), place
    ).items():
        out = place / "out"
        run(*arguments, "--val-fraction", 0, "--out", out, "--workers", args.threads)
        stream = open_dataset(out).split("train")
        assert stream is not None
        ids = stream.read(0, len(stream))
        shutil.rmtree(out)
        starts = np.flatnonzero(ids == EOT)
        found = np.split(ids, starts)[1:]
        same = sum(
            bool(np.array_equal(mine[1:], np.array(reference().encode_ordinary(text), np.uint16)))
            for mine, text in zip(found, texts, strict=False)
        )
        kinds[kind] = {"documents": len(texts), "found": len(found), "equal": same}
        good &= same == len(texts) == len(found)
        print(f"  {kind:22} {same:,} of {len(texts):,} documents")
    return {"good": good, "kinds": kinds}


def digest(directory: Path) -> str:
    """SHA-256 of all files of a data set."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def determinism(args: argparse.Namespace, documents: list[str], place: Path) -> dict[str, Any]:
    """Data sets must be byte-identical: with 1 and 2 workers, and after repeated kills."""
    print("byte-identical data sets")
    (place / "x.txt").write_text(SEPARATOR.join(first(documents, args.speed_bytes)))
    arguments = ["text", place / "x.txt", "--split", "eot", "--shard-tokens", "1M"]
    run(*arguments, "--workers", 1, "--out", place / "one")
    begin = time.monotonic()
    run(*arguments, "--workers", 2, "--out", place / "two")
    seconds = time.monotonic() - begin
    expected = digest(place / "one")
    workers_same = digest(place / "two") == expected
    print(f"  1 and 2 workers: {'identical' if workers_same else 'DIFFERENT'}")
    generator = random.Random(0)
    code = (  # a journal entry after each chunk, so that a kill can fall between any two
        "from gpt_dist.data.preparation import run; from gpt_dist.errors import run_main\n"
        "from gpt_dist.prepare import main; run.COMMIT_SECONDS = 0; run_main(main)"
    )
    kills = resumed = 0
    done = False
    while not done:
        flags = ["--workers", generator.randint(1, 3), "--out", place / "killed"]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, [*arguments, *flags])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kills < args.kills:
            time.sleep(0.5 + generator.random() * seconds / 2)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        _, errors = process.communicate()
        resumed += "resuming after" in errors
        done = process.returncode == 0
    killed_same = digest(place / "killed") == expected
    print(
        f"  {kills} SIGKILLs, {resumed} times resumed: "
        f"{'identical' if killed_same else 'DIFFERENT'}"
    )
    return {
        "good": workers_same and killed_same and kills > 0,
        "one_and_two_workers_identical": workers_same,
        "kills": kills,
        "resumed": resumed,
        "killed_and_rerun_identical": killed_same,
    }


def alternate(rounds: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run all sides in turn, after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            seconds = side()
            if number:
                times[name].append(seconds)
    return times


def throughput(args: argparse.Namespace, documents: list[str], place: Path) -> dict[str, Any]:
    """prepare (read, tokenise, write, checksum, flush) against tiktoken alone."""
    chosen = first(documents, args.speed_bytes)
    (place / "x.txt").write_text(SEPARATOR.join(chosen))
    total = (place / "x.txt").stat().st_size
    arguments = ["text", place / "x.txt", "--split", "eot", "--out", place / "out"]
    arguments += ["--workers", args.threads]

    def raw() -> float:
        begin = time.perf_counter()
        reference().encode_ordinary_batch(chosen, num_threads=args.threads)
        return time.perf_counter() - begin

    def ours() -> float:
        own, sys.argv = sys.argv, ["prepare", *map(str, arguments), "--overwrite"]
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            prepare.main()
        seconds = time.perf_counter() - begin
        sys.argv = own
        return seconds

    print(f"throughput on {total / 1e6:.0f} MB, {len(chosen):,} documents, {args.threads} threads")
    times = alternate(args.rounds, {"tiktoken": raw, "prepare": ours})
    speeds = {name: [total / seconds / 1e6 for seconds in times[name]] for name in times}
    ratios = [a / b for a, b in zip(times["tiktoken"], times["prepare"], strict=True)]
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"  {name:9} {median:6.1f} MB/s ({min(values):.1f}–{max(values):.1f})")
    ratio = statistics.median(ratios)
    print(f"  prepare / encode_ordinary_batch: {ratio:.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
    return {
        "good": ratio >= 0.85,
        "bytes": total,
        "documents": len(chosen),
        "threads": args.threads,
        "megabytes_per_second": speeds,
        "ratio_median": ratio,
        "ratios": ratios,
    }


def loader(args: argparse.Namespace, documents: list[str], place: Path) -> dict[str, Any]:
    """Tokens per second of the training loader with a full shuffle, in one process."""
    print("loader, one process")
    (place / "x.txt").write_text(SEPARATOR.join(first(documents, args.speed_bytes)))
    run("text", place / "x.txt", "--split", "eot", "--shard-tokens", "3M", "--out", place / "data")
    figures, good = {}, True
    for context, batch in ((64, 12), (64, 64), (256, 64), (1024, 16), (1024, 64)):
        flags = {"data.path": place / "data", "model.context_length": context}
        flags |= {"train.batch_tokens": context * batch}
        config, _ = load(as_flags(flags))
        data = TrainingData(config, [open_dataset(place / "data")])
        speeds = []
        for _ in range(args.rounds):
            batches = Loader(
                data,
                batch_sequences=batch,
                micro_batch=batch,
                rank=0,
                world_size=1,
                device=torch.device("cpu"),
            )
            steps, begin = 0, time.perf_counter()
            while (seconds := time.perf_counter() - begin) < 1:
                steps += sum(1 for _ in batches.step())
            batches.close()
            speeds.append(steps * batch * context / seconds / 1e6)
        name = f"context {context}, batch {batch}"
        median = statistics.median(speeds)
        figures[name] = {"million_tokens_per_second": speeds, "median": median}
        good &= median >= 20
        print(f"  {name:24} {median:7.1f} M tokens/s ({min(speeds):.1f}–{max(speeds):.1f})")
    return {"good": good, "figures": figures}


def memory(args: argparse.Namespace, documents: list[str], place: Path) -> dict[str, Any]:
    """Peak resident memory of ``prepare`` on a large input."""
    print(f"peak memory on {args.memory_bytes / 1e9:.1f} GB")
    figures, good = {}, True
    code = (
        "import sys; from gpt_dist import prepare; prepare.main()\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    for kind, (path, flags) in {
        "documents": (place / "x.txt", ["text", "--split", "eot"]),
        "one document": (place / "one.txt", ["text"]),
        "parquet": (place / "x.parquet", ["parquet"]),
    }.items():
        write_large(path, documents, args.memory_bytes, "\n\n" if kind == "one document" else None)
        arguments = [*flags, path, "--out", place / "out", "--workers", args.threads]
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.monotonic() - begin
        megabytes = int(done.stdout.split()[-1]) / 1024
        info = open_dataset(place / "out").info["splits"]
        text_bytes = sum(entry["bytes"] for entry in info.values())
        tokens = sum(entry["tokens"] for entry in info.values())
        figures[kind] = {
            "peak_megabytes": megabytes,
            "text_bytes": text_bytes,
            "tokens": tokens,
            "seconds": seconds,
        }
        good &= megabytes < 1024
        print(f"  {kind:12} {megabytes:6.0f} MB  ({tokens:,} tokens, {seconds:.0f} s)", flush=True)
        shutil.rmtree(place / "out")
        path.unlink()
    return {"good": good, "kinds": figures}


if __name__ == "__main__":
    run_main(main)
