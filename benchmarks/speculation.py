"""Decoding with and without guesses, in turns, on text that repeats and on text that does not.

    python benchmarks/speculation.py --checkpoint runs/repeating \\
        --json benchmarks/results/speculation.json

`repeating.yaml` trains that model. Every sequence of every round has a prompt of its own. Both
decoders take their steps in turns, and must choose the same tokens; prefill is not measured. Where
no checkpoint is given, the model is GPT-2 124M with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import repeating
import torch
from bandwidth import bandwidth
from record import record
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gpt_dist.checkpoints.reader import load_model
from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import run_main
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.lookup import Memory
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from gpt_dist.text.bundled import shakespeare
from gpt_dist.text.tokenizers import Tokenizer, load_tokenizer

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}

GREEDY, DRAWN = {"temperature": 0.0}, {"temperature": 1.0}


def passage(index: int, length: int = 200) -> str:
    """A passage of Shakespeare, another one for each index."""
    plays = shakespeare()
    start = 5000 * (index + 1) % (len(plays) - length)
    return plays[start : start + length]


def story(index: int) -> str:
    """The beginning of a story, another one for each index; its refrain came once or twice."""
    return repeating.story(Random(f"continued {index}"), "")[:330]


KINDS: dict[str, tuple[Callable[[int], str], dict[str, float]]] = {
    "list": (
        lambda n: "".join(f"{i}. The {['big', 'red', 'tree'][i % 3]} {n}.\n" for i in range(1, 12)),
        GREEDY,
    ),
    "code": (
        lambda n: "".join(
            f"def get_{name}{n}(self):\n    return self.{name}{n}\n\n" for name in "abcdefg"
        ),
        GREEDY,
    ),
    "copied passage": (lambda n: 2 * (passage(n) + "\n\n") + passage(n)[:40], GREEDY),
    "story": (story, GREEDY),
    "story, drawn": (story, DRAWN),
    "noise": (lambda n: "", DRAWN),
}
"""Prompts by index, and how they are continued. Noise begins with random tokens."""


def prompts(kind: str, indices: range, tokenizer: Tokenizer, room: int) -> list[list[int]]:
    dice = np.random.default_rng(indices.start)
    return [
        tokenizer.encode(KINDS[kind][0](index))[-room:]
        or dice.integers(tokenizer.vocab_size, size=64).tolist()
        for index in indices
    ]


class Contestant:
    """A decoder with the sequences of one batch, and what they have taken so far."""

    def __init__(
        self, decoder: Decoder, texts: list[list[int]], params: list[SamplingParams], new: int
    ) -> None:
        self.decoder, self.new = decoder, new
        self.tokens: list[list[int]] = [[] for _ in texts]
        self.seconds, self.steps = 0.0, 0
        memory = Memory()
        for slot, (ids, sampling) in enumerate(zip(texts, params, strict=True)):
            decoder.prefill(slot, ids[:-1])
            decoder.activate(slot, sampling, ids, memory)
        decoder.flush()

    def step(self) -> bool:
        """Take one step; whether there is another."""
        began = time.perf_counter()
        result = self.decoder.step()
        self.seconds += time.perf_counter() - began
        self.steps += 1
        for slot, token in zip(result.slots, result.tokens, strict=True):
            self.tokens[slot].append(token)
        for slot in self.decoder.active_slots:
            if len(self.tokens[slot]) >= self.new:
                self.decoder.free(slot)
        return bool(self.decoder.active_slots)


def run(
    decoders: dict[str, Decoder], texts: list[list[int]], params: list[SamplingParams], new: int
) -> dict[str, Contestant]:
    """Decode one batch with each decoder, step by step in turns: what disturbs one disturbs all."""
    runs = {name: Contestant(decoder, texts, params, new) for name, decoder in decoders.items()}
    going = list(runs.values())
    while going:
        going = [contestant for contestant in going[::-1] if contestant.step()]
    return runs


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Figures by kind of text and batch size."""
    if args.checkpoint:
        model, tokenizer, _ = load_model(args.checkpoint)
    else:
        torch.manual_seed(0)
        model, tokenizer = GPT(ModelConfig(vocab_size=50257)).eval(), load_tokenizer("gpt2")
    decoders = {
        name: Decoder(model, max_slots=max(args.batch), dtype=args.dtype, speculate=name == "auto")
        for name in ("off", "auto")
    }
    room = decoders["off"].max_context - args.new
    found: dict[str, Any] = {}
    cases = [(kind, batch) for kind in args.kind for batch in args.batch]
    for kind, batch in track(cases, "measuring", console=Console(stderr=True)):
        rounds: list[dict[str, Contestant]] = []
        for number in range(args.rounds + 1):
            indices = range(number * batch, (number + 1) * batch)
            texts = prompts(kind, indices, tokenizer, room)
            params = [SamplingParams(seed=index, **KINDS[kind][1]) for index in indices]
            results = run(decoders, texts, params, args.new)
            pairs = zip(results["off"].tokens, results["auto"].tokens, strict=True)
            if any(off[: args.new] != auto[: args.new] for off, auto in pairs):
                raise SystemExit(f"{kind}, batch {batch}: the tokens differ")
            rounds.append(results)
        rounds = rounds[1:]  # the first one warms up
        count = args.new * batch
        ratios = [each["off"].seconds / each["auto"].seconds for each in rounds]
        found.setdefault(kind, {})[batch] = {
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
            "tokens_per_second": {
                name: count / statistics.median(each[name].seconds for each in rounds)
                for name in decoders
            },
            "tokens_per_step": count / statistics.median(each["auto"].steps for each in rounds),
        }  # fmt: skip
    size = model.num_parameters(embeddings=False) * BYTES[decoders["off"].dtype]
    return {
        "model": f"{model.num_parameters():,} parameters, {decoders['off'].dtype}",
        "backend": decoders["off"].backend,
        "one_token_a_pass_per_second": bandwidth() / size,
        "by_text": found,
    }


def show(results: dict[str, Any], batches: list[int]) -> None:
    table = Table("auto / off (tokens a step)", *(f"batch {batch}" for batch in batches))
    for kind, by_batch in results["by_text"].items():
        cells = (by_batch[batch] for batch in batches)
        table.add_row(
            kind,
            *(
                f"{c['ratio']:.2f}× ({c['lowest']:.2f}–{c['highest']:.2f}), "
                f"{c['tokens_per_second']['auto']:,.0f} tok/s ({c['tokens_per_step']:.1f})"
                for c in cells
            ),
        )
    Console().print(table)
    limit = results["one_token_a_pass_per_second"]
    print(f"limit of one token for each pass over the weights: {limit:,.0f} tok/s at batch 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--checkpoint", help="a run; default: GPT-2 124M with random weights")
    parser.add_argument("--dtype", default="bf16", choices=list(BYTES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--new", type=int, default=160, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    results = measure(args)
    show(results, args.batch)
    record(args.json, results, packages=("torch",))


if __name__ == "__main__":
    run_main(main)
