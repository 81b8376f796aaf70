"""The default directory of each data set, and the command that makes the data set of a name."""

from __future__ import annotations

from pathlib import Path

VARIANTS = {"fineweb": "sample-10BT", "fineweb-edu": "sample-10BT"}
"""Sources with variants, and their default variant."""
NAMED_SOURCES = ("shakespeare", "tinyshakespeare", "tinystories", "fineweb-edu", "fineweb")
"""Sources that need no argument."""


def default_directory(source: str, variant: str | None, tokenizer: str) -> Path:
    """Where ``gpt_dist.prepare`` writes without ``--out``: data/SOURCE[-VARIANT][-TOKENIZER]."""
    parts = [source, variant or VARIANTS.get(source), None if tokenizer == "gpt2" else tokenizer]
    return Path("data") / "-".join(part for part in parts if part)


def prepare_command(directory: Path) -> str:
    """The command that makes a missing data set, as far as its name says which it is."""
    name, tokenizer = directory.name, "gpt2"
    for kind in ("char", "bpe"):
        if name.endswith(f"-{kind}"):
            name, tokenizer = name.removesuffix(f"-{kind}"), kind
    for source in NAMED_SOURCES:
        variant = name.removeprefix(f"{source}-") if source in VARIANTS else name
        if name == source or variant != name:
            command = f"python -m gpt_dist.prepare {source}"
            command += f" --variant {variant}" if variant != name else ""
            command += f" --tokenizer {tokenizer}" if tokenizer != "gpt2" else ""
            default = default_directory(source, variant if variant != name else None, tokenizer)
            return command if directory == default else f"{command} --out {directory}"
    return "python -m gpt_dist.prepare SOURCE (--help lists the sources)"
