"""Turn a pretrained GPT-2 into a checkpoint, to fine-tune it, generate from it or serve it.

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

from gpt_dist.errors import GptDistError, Parser, UsageError, run_main

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
    parser = Parser(
        prog="gpt_dist.import_hf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn a pretrained GPT-2 into a checkpoint for --train.init_from, generate\n"
        "and serve. Weights are read only from safetensors and llm.c files; nothing is unpickled.",
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
        help="tokenizer of an llm.c file (default: gpt2, if its vocabulary has 50,257 tokens)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Import as the command line says.

    Raises:
        UsageError: no such source, not a GPT-2, or ``--out`` exists.
        GptDistError: the hub cannot be reached, or a file is damaged.
    """
    args = make_parser().parse_args(argv)
    out = Path(args.out)

    from gpt_dist.files import new_directory

    with new_directory(out) as directory:  # refuses an --out that exists, before any work
        config, weights, tokenizer = open_source(args.source, args.tokenizer)
        write(directory, config, weights, tokenizer, args.source)
    print(
        f"wrote {out}: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"context {config.context_length}, {tokenizer.name} tokenizer"
    )


def open_source(
    source: str, tokenizer_name: str | None
) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]], Tokenizer]:
    """Configuration, weights one at a time, and tokenizer of a model.

    Args:
        source: Hugging Face directory, name on the hub, or llm.c weight file.
        tokenizer_name: of an llm.c file, which holds none; None = gpt2.

    Raises:
        UsageError: no such source, not a GPT-2, or a tokenizer that does not fit.
        GptDistError: the hub cannot be reached, or a file is damaged.
    """
    from gpt_dist.formats.hf import load_pretrained
    from gpt_dist.formats.llmc import is_llmc_file, read_llmc
    from gpt_dist.text.tokenizers import load_tokenizer

    path = Path(source)
    if not path.is_file():
        if tokenizer_name is not None:
            raise UsageError("--tokenizer: valid only with an llm.c file; a directory has its own")
        return load_pretrained(path if path.is_dir() else download(source))
    if not is_llmc_file(path):
        raise UsageError(
            f"{path}: not an llm.c weight file; valid is also a directory or a name on the hub"
        )
    config, weights = read_llmc(path)
    if tokenizer_name is None and config.vocab_size != 50257:
        raise UsageError(
            f"{path}: its vocabulary has {config.vocab_size} tokens, gpt2's has 50257; "
            "name its tokenizer with --tokenizer"
        )
    tokenizer = load_tokenizer(tokenizer_name or "gpt2")
    if tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"--tokenizer {tokenizer_name}: {tokenizer.vocab_size} tokens, "
            f"but {path} has {config.vocab_size}"
        )
    return config, weights, tokenizer


def download(name: str) -> Path:
    """Download a model from the Hugging Face hub; returns its directory in the hub's cache.

    config.json is read first, so that another architecture is refused before the weights are
    downloaded.

    Raises:
        UsageError: not a valid name on the hub, or not a GPT-2.
        GptDistError: the hub cannot be reached, or has no such model.
    """
    from gpt_dist.formats.hf import from_hf_config

    if not HUB_NAME.fullmatch(name):
        raise UsageError(f"{name}: no such directory or file, and not a valid name on the hub")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # One quick request first, because a download retries for half a minute.
        HfApi().model_info(name, timeout=15)
        unreachable = ""
    except RepositoryNotFoundError:
        raise GptDistError(f"{name}: no such directory, and no such model on the hub") from None
    except Exception as error:  # the network libraries raise many kinds
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
            f"{name}: no such directory, and not found on the Hugging Face hub: {reason}"
        ) from None


def write(
    directory: Path,
    config: ModelConfig,
    weights: Iterator[tuple[str, Tensor]],
    tokenizer: Tokenizer,
    source: str,
) -> None:
    """Fill an empty directory with a checkpoint of step 0, without optimizer state.

    Args:
        directory: empty.
        config: of the model, with ``vocab_size`` set.
        weights: (parameter, fp32 tensor).
        tokenizer: the model's.
        source: where it is from, for ``state.json``.
    """
    from gpt_dist.checkpoints.writer import write_checkpoint

    tensors = {f"model.{name}": tensor for name, tensor in weights}
    state = {"step": 0, "config": {"model": config.model_dump()}, "imported_from": source}
    write_checkpoint(directory, tensors, state, tokenizer)


if __name__ == "__main__":
    run_main(main)
