"""Continue a prompt with a trained model; the text appears as it grows.

python -m gpt_dist.generate --checkpoint runs/mine --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpt_dist.errors import Parser, UsageError, run_main

if TYPE_CHECKING:
    from gpt_dist.text.tokenizers import Tokenizer


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gpt_dist.generate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Continue a prompt with a trained model; the text appears as it grows.",
        epilog="examples:\n"
        '  python -m gpt_dist.generate --checkpoint runs/mine --prompt "Once upon a time"\n'
        "  python -m gpt_dist.generate --checkpoint runs/mine --num-samples 4 --temperature 1\n"
        "  python -m gpt_dist.generate --checkpoint my-gpt2 --prompt - --seed 7 < beginning.txt",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run directory (its newest checkpoint), checkpoint or exported directory",
    )
    add(
        "--prompt",
        default="",
        metavar="TEXT",
        help="text to continue; - reads standard input (default: a new document)",
    )
    add("--num-samples", type=int, default=1, metavar="N", help="continuations (default: 1)")
    add(
        "--max-new-tokens",
        type=int,
        default=200,
        metavar="N",
        help="length of each, at most (default: 200)",
    )
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="0 always takes the most likely token (default: 0.8)",
    )
    add(
        "--top-k",
        type=int,
        default=200,
        metavar="N",
        help="draw from the N most likely tokens, 0 from all (default: 200)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="draw from the most likely tokens of this total probability (default: 1, all)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="same seed, same text; sample i has seed N + i (default: 0)",
    )
    add("--ignore-eos", action="store_true", help="continue after the end of a document")
    add(
        "--stop-at-context",
        action="store_true",
        help="end when the model's context is full (default: continue with its last half)",
    )
    add(
        "--speculate",
        default="auto",
        choices=("auto", "off"),
        help="guess tokens from earlier text and verify several at once where that is faster; "
        "the text is the same (default: auto)",
    )
    add("--device", default="auto", choices=("auto", "cuda", "cpu", "mps"))
    add(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "int8"),
        help="of the weights (default: the fastest that needs no quantising)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Generate as the command line says.

    Raises:
        UsageError: an option out of range, nothing to load, or, with ``--stop-at-context``, a
            prompt that does not fit.
        GptDistError: a damaged checkpoint.
    """
    args = make_parser().parse_args(argv)
    for option, least in (("num_samples", 1), ("max_new_tokens", 1)):
        if getattr(args, option) < least:
            name = option.replace("_", "-")
            raise UsageError(f"--{name} {getattr(args, option)}: must be at least {least}")

    from gpt_dist.inference.sampling import SamplingParams

    sampling = [
        SamplingParams(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed + index
        )
        for index in range(args.num_samples)
    ]

    from dataclasses import replace

    from gpt_dist.checkpoints.reader import load_model
    from gpt_dist.inference.decoder import Decoder
    from gpt_dist.inference.generation import generate_many, kept_tokens
    from gpt_dist.parallel.world import pick_device

    device = pick_device(args.device, 0)
    model, tokenizer, _ = load_model(args.checkpoint)
    prompt = read_stdin() if args.prompt == "-" else args.prompt
    ids = prompt_ids(tokenizer, prompt)
    limit = model.config.context_length
    if len(ids) > limit and args.stop_at_context:
        raise UsageError(f"--prompt: {len(ids)} tokens exceed the model's context of {limit}")
    if len(ids) > limit:
        tell(f"note: --prompt: {len(ids)} tokens; the model sees the last {limit}, its context")
    if tokenizer.eot_id is not None and not args.ignore_eos:
        sampling = [replace(one, stop_ids=(tokenizer.eot_id,)) for one in sampling]
    slots = min(args.num_samples, 32)
    decoder = Decoder(
        model,
        max_slots=slots,
        device=device,
        dtype=args.dtype,
        speculate=args.speculate == "auto",
    )
    tokens = generate_many(
        decoder,
        [ids] * args.num_samples,
        sampling,
        args.max_new_tokens,
        past_context=not args.stop_at_context,
    )
    longest = max(show(tokens, tokenizer, prompt, args.num_samples))
    room = max(1, limit - len(ids) + 1)
    if longest > room and model.config.n_layer:  # the bigram baseline sees one token anyway
        tell(
            f"note: the text passed the model's context of {limit} tokens; past it each token "
            f"follows from the last {kept_tokens(limit)} to {limit} (--stop-at-context ends there)"
        )
    elif args.stop_at_context and longest == room < args.max_new_tokens:
        tell(f"ended: the model's context of {limit} tokens is full")


def tell(line: str) -> None:
    """Print a line that is not part of the text."""
    print(line, file=sys.stderr)


def read_stdin() -> str:
    """Standard input.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt -: not UTF-8: byte {error.start:,}") from None


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of the prompt; without one, the token that stands before each document.

    Raises:
        UsageError: the prompt is empty and there is no such token.
    """
    if prompt:
        return tokenizer.encode(prompt)
    if tokenizer.eot_id is None:
        raise UsageError(
            f"--prompt: must not be empty, as the {tokenizer.name} tokenizer has no end-of-text "
            "token to begin with"
        )
    return [tokenizer.eot_id]


def show(
    tokens: Iterator[tuple[int, int]], tokenizer: Tokenizer, prompt: str, samples: int
) -> list[int]:
    """Print samples as they grow: one as plain text, several on a terminal side by side.

    Args:
        tokens: (sample, token id) as they come.
        tokenizer: turns them into text, whole characters at a time.
        prompt: stands before each sample.
        samples: how many there are.

    Returns:
        Tokens of each sample.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    from gpt_dist.text.tokenizers import StreamDecoder

    def put(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    decoders = [StreamDecoder(tokenizer) for _ in range(samples)]
    texts, counts = [prompt] * samples, [0] * samples
    if samples == 1:
        put(prompt)
        for _, token in tokens:
            put(decoders[0].push(token))
            counts[0] += 1
        put(decoders[0].flush() + "\n")
        return counts

    def view() -> Group:
        return Group(*(Panel(Text(text), title=f"sample {i}") for i, text in enumerate(texts, 1)))

    console = Console()
    # The live view shows as much as fits; the full text replaces it at the end.
    with Live(console=console, transient=True, get_renderable=view):
        for sample, token in tokens:
            texts[sample] += decoders[sample].push(token)
            counts[sample] += 1
    for index, (text, decoder) in enumerate(zip(texts, decoders, strict=True)):
        put(("-" * 8 + "\n" if index else "") + text + decoder.flush() + "\n")
    return counts


if __name__ == "__main__":
    run_main(main)
