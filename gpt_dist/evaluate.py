"""Score a model: HellaSwag, LAMBADA, or the perplexity of a text.

python -m gpt_dist.evaluate --checkpoint runs/mine --task hellaswag
torchrun --nproc_per_node=8 -m gpt_dist.evaluate --checkpoint runs/mine --task lambada
python -m gpt_dist.evaluate --checkpoint runs/mine --task perplexity --source book.txt
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gpt_dist.errors import Parser, UsageError, run_main
from gpt_dist.parallel.watchdog import die_with_agent

if TYPE_CHECKING:
    from gpt_dist.parallel.world import World

TASKS = ("hellaswag", "lambada", "perplexity")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gpt_dist.evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Score a model: HellaSwag (in llm.c's completion style and in lm-eval style),\n"
        "LAMBADA (accuracy and perplexity of the last word), or the perplexity of a text.",
        epilog="examples:\n"
        "  python -m gpt_dist.evaluate --checkpoint runs/mine --task hellaswag --limit 500\n"
        "  torchrun --nproc_per_node=8 -m gpt_dist.evaluate --checkpoint my-gpt2 --task lambada\n"
        "  python -m gpt_dist.evaluate --checkpoint runs/mine --task perplexity --source book.txt "
        "--stride 256",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run directory (its newest checkpoint), checkpoint or exported directory",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="score the average of the weights that the checkpoint holds (optim.average)",
    )
    parser.add_argument("--task", required=True, metavar="NAME", help=" | ".join(TASKS))
    parser.add_argument(
        "--source",
        metavar="FILE",
        help="hellaswag, lambada: JSON lines, may be gzipped (default: from the Hugging Face hub); "
        "perplexity: the text",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use the first N examples (perplexity: tokens)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="perplexity: tokens between windows (default: the context length, no overlap)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="rows at a time (default: 16)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu", "mps"))
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16"),
        help="arithmetic of the matrix products (default: fp32)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line says; rank 0 prints.

    Raises:
        UsageError: an unknown task, nothing to load, a malformed line in the source.
        GptDistError: a damaged checkpoint, or data that cannot be downloaded.
    """
    args = make_parser().parse_args(argv)
    check(args)

    from gpt_dist.checkpoints.checkpoint import resolve
    from gpt_dist.checkpoints.reader import load_model
    from gpt_dist.parallel.world import start

    directory = resolve(args.checkpoint)
    with start(args.device) as world:
        data = read(args, world)
        model, tokenizer, _ = load_model(directory, world.device, average=args.average)
        results = run(args, model, tokenizer, data, world)
    if not world.is_main:
        return
    if args.json:
        print(json.dumps({"task": args.task, "checkpoint": str(directory), **as_json(results)}))
    else:
        print_results(args.task, results)


def check(args: argparse.Namespace) -> None:
    """Check the options before anything is loaded.

    Raises:
        UsageError: naming the option and what is valid.
    """
    if args.task not in TASKS:
        raise UsageError(f"--task {args.task}: no such task; valid are {', '.join(TASKS)}")
    for option in ("limit", "stride", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} {value}: must be at least 1")
    if args.task == "perplexity" and args.source is None:
        raise UsageError("--task perplexity: needs --source FILE, the text")
    if args.task != "perplexity" and args.stride is not None:
        raise UsageError(f"--stride: only for --task perplexity, not {args.task}")


def read(args: argparse.Namespace, world: World) -> Any:
    """The task's data; from the hub, rank 0 of the world downloads it first."""
    from pathlib import Path

    from gpt_dist.evaluation import tasks

    if args.task == "perplexity":
        return tasks.read_source(Path(args.source))
    reader = tasks.read_hellaswag if args.task == "hellaswag" else tasks.read_lambada
    if args.source is not None or world.size == 1:
        return reader(args.source, args.limit)
    rows = reader(None, args.limit) if world.is_main else None
    return world.broadcast(rows)


def run(args: argparse.Namespace, model: Any, tokenizer: Any, data: Any, world: World) -> Any:
    """The task's results, the same on every rank."""
    import torch

    from gpt_dist.evaluation import tasks

    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    scoring = {"batch_size": args.batch_size, "world": world, "dtype": dtype}
    with progress(args.task, world) as on_done:
        if args.task == "hellaswag":
            results: Any = tasks.hellaswag(model, tokenizer, data, on_done=on_done, **scoring)
            return {"examples": len(data), **results}
        if args.task == "lambada":
            results = tasks.lambada(model, tokenizer, data, on_done=on_done, **scoring)
            return {"examples": len(data), **results}
        return tasks.perplexity(
            model,
            tokenizer,
            data,
            stride=args.stride,
            limit=args.limit,
            on_done=on_done,
            **scoring,
        )


@contextmanager
def progress(task: str, world: World) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on rank 0's terminal; yields what updates it (requests done, requests in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    console = Console(stderr=True)
    if not world.is_main or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)


def as_json(results: Any) -> Any:
    """Means as ``{"value", "stderr"}``; NaN and infinity as null."""
    if isinstance(results, dict):
        return {key: as_json(value) for key, value in results.items()}
    if isinstance(results, tuple):
        return as_json(results._asdict())  # type: ignore[attr-defined]
    return None if isinstance(results, float) and not math.isfinite(results) else results


def print_results(task: str, results: dict[str, Any]) -> None:
    """Print the results as text."""
    if task == "perplexity":
        print(
            f"perplexity {results['perplexity']:.4f} per token over {results['tokens']:,} tokens "
            f"(loss {results['loss']:.4f} nats), {results['word_perplexity']:.4f} per word, "
            f"{results['bits_per_byte']:.4f} bits per byte"
        )
        return
    print(f"{task}, {results['examples']:,} examples")
    names = {"completion": "completion style (llm.c)", "lm_eval": "lm-eval style"}
    lines = {names[k]: v for k, v in results.items() if k in names} or {
        "": {k: v for k, v in results.items() if k != "examples"}
    }
    for name, scores in lines.items():
        shown = "   ".join(f"{k} {v.value:.4f} ± {v.stderr:.4f}" for k, v in scores.items())
        print(f"  {name:<26}{shown}" if name else f"  {shown}")


if __name__ == "__main__":
    die_with_agent()
    run_main(main)
