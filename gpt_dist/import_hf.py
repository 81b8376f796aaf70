"""Turn a pretrained GPT-2 into a checkpoint: to fine-tune, generate from, or serve.

python -m gpt_dist.import_hf openai-community/gpt2 --out checkpoints/gpt2
python -m gpt_dist.import_hf ./a-transformers-directory --out checkpoints/theirs
python -m gpt_dist.import_hf gpt2_124M.bin --out checkpoints/llmc
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpt_dist.errors import GptDistError, UsageError, run_main

if TYPE_CHECKING:
    from torch import Tensor

    from gpt_dist.config.settings import ModelConfig
    from gpt_dist.text.tokenizers import Tokenizer

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_FILES = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpt_dist.import_hf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn a pretrained GPT-2 into a checkpoint for --train.init_from, generate\n"
        "and serve. Weights are read from safetensors or llm.c files only; nothing is unpickled.",
        epilog="examples:\n"
        "  python -m gpt_dist.import_hf openai-community/gpt2 --out checkpoints/gpt2\n"
        "  python -m gpt_dist.import_hf ./their-directory --out checkpoints/theirs\n"
        "  python -m gpt_dist.import_hf gpt2_124M.bin --out checkpoints/llmc\n"
        "then:\n"
        "  python -m gpt_dist.train --train.init_from checkpoints/gpt2 ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="DIR_OR_HUB_NAME",
        help="Hugging Face directory, name on the hub, or llm.c weight file",
    )
    parser.add_argument("--out", required=True, metavar="CHECKPOINT", help="new directory")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help="tokenizer of an llm.c file (default: gpt2 where its vocabulary has 50,257 tokens)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Import as the command line says.

    Raises:
        UsageError: no such source, not a GPT-2, or an ``--out`` that exists.
        GptDistError: the hub cannot be reached, or a file is damaged.
    """
    args = make_parser().parse_args(argv)
    out = Path(args.out)

    from gpt_dist.files import new_directory

    with new_directory(out) as directory:  # also refuses an --out that is taken, before any work
        config, weights, tokenizer = open_source(args.source, args.tokenizer)
        write(directory, config, weights, tokenizer, args.source)
    print(
        f"wrote {out}: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"context {config.context_length}, {tokenizer.name} tokenizer"
    )


def open_source(
    source: str, tokenizer_name: str | None
) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]], Tokenizer]:
    """Configuration, weights one at a time, and tokenizer of whatever ``source`` names."""
    from gpt_dist.formats.hf import load_pretrained
    from gpt_dist.formats.llmc import is_llmc_file, read_llmc
    from gpt_dist.text.tokenizers import load_tokenizer

    path = Path(source)
    if not path.is_file():
        if tokenizer_name is not None:
            raise UsageError("--tokenizer: only llm.c files need it; directories have their own")
        return load_pretrained(path if path.is_dir() else download(source))
    if not is_llmc_file(path):
        raise UsageError(f"{path}: not an llm.c weight file; name a directory or a hub model")
    config, weights = read_llmc(path)
    if tokenizer_name is None and config.vocab_size != 50257:
        raise UsageError(
            f"{path}: its vocabulary has {config.vocab_size} tokens, so it is not gpt2's; "
            "say whose it is with --tokenizer"
        )
    tokenizer = load_tokenizer(tokenizer_name or "gpt2")
    if tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"--tokenizer {tokenizer_name}: {tokenizer.vocab_size} tokens, "
            f"but {path} has {config.vocab_size}"
        )
    return config, weights, tokenizer


def download(name: str) -> Path:
    """A model of the Hugging Face hub, in the hub's cache.

    Its config.json comes first, so that another architecture is refused before gigabytes come.

    Raises:
        UsageError: not a name that the hub could have, or not a GPT-2.
        GptDistError: the hub cannot be reached, or has no such model.
    """
    from gpt_dist.formats.hf import from_hf_config

    if not HUB_NAME.fullmatch(name):
        raise UsageError(f"{name}: no such directory or file, nor a name on the Hugging Face hub")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # One quick question, because downloads repeat theirs for half a minute.
        HfApi().model_info(name, timeout=15)
        unreachable = ""
    except RepositoryNotFoundError:
        raise GptDistError(f"{name}: no such directory, nor such a model on the hub") from None
    except Exception as error:  # network libraries raise what they like
        unreachable = next(iter(str(error).splitlines()), "") or type(error).__name__
    cached_only = bool(unreachable)
    try:
        config = hf_hub_download(name, "config.json", local_files_only=cached_only)
        from_hf_config(json.loads(Path(config).read_text(encoding="utf-8")), name)
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=cached_only))
    except GptDistError:
        raise
    except Exception as error:
        reason = unreachable or next(iter(str(error).splitlines()), "") or type(error).__name__
        raise GptDistError(
            f"{name}: no such directory, and not to be had from the Hugging Face hub: {reason}"
        ) from None


def write(
    directory: Path,
    config: ModelConfig,
    weights: Iterator[tuple[str, Tensor]],
    tokenizer: Tokenizer,
    source: str,
) -> None:
    """Fill an empty directory with a checkpoint of step 0 (without optimizer state)."""
    from gpt_dist.checkpoints.writer import write_checkpoint

    tensors = {f"model.{name}": tensor for name, tensor in weights}
    state = {"step": 0, "config": {"model": config.model_dump()}, "imported_from": source}
    write_checkpoint(directory, tensors, state, tokenizer)


if __name__ == "__main__":
    run_main(main)
