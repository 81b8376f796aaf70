"""Export a trained model: to a Hugging Face directory or to llm.c's weight file.

python -m gpt_dist.export --checkpoint runs/mine --out my-gpt2
python -m gpt_dist.export --checkpoint runs/mine --out gpt2_mine.bin --format llmc --dtype bf16
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_dist.errors import Parser, UsageError, run_main

if TYPE_CHECKING:
    from gpt_dist.model.gpt import GPT
    from gpt_dist.text.tokenizers import Tokenizer

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gpt_dist.export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Export a trained model to a directory for transformers and tools that read\n"
        "its format, or to a weight file for llm.c.",
        epilog="examples:\n"
        "  python -m gpt_dist.export --checkpoint runs/mine --out my-gpt2\n"
        "  python -m gpt_dist.export --checkpoint runs/mine/checkpoints/best --out best "
        "--dtype bf16\n"
        "  python -m gpt_dist.export --checkpoint runs/mine --out mine.bin --format llmc",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run directory (for its newest checkpoint), checkpoint or exported directory",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="export the average of the weights that the checkpoint holds (optim.average)",
    )
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="new directory (hf) or file (llmc)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)"
    )
    parser.add_argument(
        "--format",
        choices=("hf", "llmc"),
        default="hf",
        help="hf: directory for transformers; llmc: llm.c's .bin (default: hf)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Export as the command line says.

    Raises:
        UsageError: nothing to load, ``--out`` exists, or the format does not support the model.
        GptDistError: a damaged checkpoint.
    """
    args = make_parser().parse_args(argv)
    out = Path(args.out)
    if args.format == "llmc" and out.exists():
        raise UsageError(f"--out {out}: exists already; choose a new file")

    import torch

    from gpt_dist.checkpoints.checkpoint import resolve
    from gpt_dist.checkpoints.reader import load_model

    directory = resolve(args.checkpoint)
    model, tokenizer, state = load_model(directory, average=args.average)
    dtype = getattr(torch, DTYPES[args.dtype])
    if args.format == "llmc":
        export_llmc(model, out, dtype)
        print(f"wrote {out}: {model.num_parameters():,} parameters, {args.dtype}, for llm.c")
        return
    figures = run_figures(directory, state)
    export_hf(model, tokenizer, out, dtype, figures)
    print(
        f"wrote {out}: {model.num_parameters():,} parameters, {args.dtype}\n"
        f'  AutoModelForCausalLM.from_pretrained("{out}")'
    )


def export_llmc(model: GPT, out: Path, dtype: Any) -> None:
    """Write llm.c's weight file. It appears complete or not at all.

    Args:
        model: to be written.
        out: the file.
        dtype: torch.float32 or torch.bfloat16.

    Raises:
        UsageError: llm.c does not support the model or the dtype.
    """
    from gpt_dist.checkpoints.tensor_files import write_file
    from gpt_dist.formats.llmc import to_llmc

    chunks = to_llmc(model, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.part")
    try:
        write_file(temporary, chunks)
        temporary.rename(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def export_hf(
    model: GPT, tokenizer: Tokenizer, out: Path, dtype: Any, figures: dict[str, Any] | None = None
) -> None:
    """Write a directory that transformers loads without options. It appears complete or not at all.

    Args:
        model: any but the bigram baseline.
        tokenizer: the model's.
        out: a new or empty directory.
        dtype: of the weights (torch.float32, bfloat16 or float16).
        figures: from ``run_figures``, for the model card.

    Raises:
        UsageError: ``out`` exists and is not empty, or transformers has no such architecture.
    """
    from gpt_dist.checkpoints.tensor_files import safetensors_chunks, write_file
    from gpt_dist.files import new_directory
    from gpt_dist.formats.hf import to_hf_config, to_hf_weights
    from gpt_dist.formats.hf_tokenizers import tokenizer_files
    from gpt_dist.formats.model_card import model_card

    config = model.config
    data = to_hf_config(config, tokenizer.eot_id, dtype)
    texts = tokenizer_files(tokenizer, config.context_length)
    pad_token = json.loads(texts["tokenizer_config.json"])["pad_token"]
    data["pad_token_id"] = tokenizer.pad_id if pad_token else None  # type: ignore[attr-defined]
    generation = {
        "bos_token_id": tokenizer.eot_id,
        "eos_token_id": tokenizer.eot_id,
        "pad_token_id": data["pad_token_id"] if pad_token else tokenizer.eot_id,
        # Without it a pipeline generates 256 tokens, even beyond the context. `max_length` would
        # make transformers warn wherever a caller sets `max_new_tokens`.
        "max_new_tokens": max(1, config.context_length // 2),
    }
    texts["config.json"] = json.dumps(data, indent=2) + "\n"
    texts["generation_config.json"] = json.dumps(generation, indent=2) + "\n"
    texts["README.md"] = model_card(model, tokenizer, out.name, data, figures or {})
    weights = ((name, p.detach().cpu()) for name, p in model.named_parameters())
    with new_directory(out) as directory:
        tensors = dict(to_hf_weights(config, weights, dtype))
        write_file(directory / "model.safetensors", safetensors_chunks(tensors))
        for name, text in texts.items():
            write_file(directory / name, [text.encode()])


def run_figures(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The run's settings and its figures at the checkpoint's step, for the model card.

    Args:
        checkpoint: the checkpoint's directory, two levels below the run's.
        state: its ``state.json``.

    Returns:
        ``config``, ``step``, and the latest value of each figure in ``metrics.jsonl`` up to that
        step. What is not known is left out.
    """
    figures: dict[str, Any] = {"config": state.get("config", {})}
    if "step" not in state:
        return figures
    metrics = checkpoint.parent.parent / "metrics.jsonl"
    if checkpoint.parent.name == "checkpoints" and metrics.is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line, which a run is still writing
                continue
            if row.get("step", 0) <= state["step"]:
                figures |= row
    return figures | {"step": state["step"]}


if __name__ == "__main__":
    run_main(main)
