"""Which part of the documents is for validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from gpt_dist.data.preparation.inputs import FileInput, split_at_line, split_by_characters
from gpt_dist.data.preparation.sources import Source
from gpt_dist.data.preparation.tokenize_pool import Input

Rule = Literal["none", "source", "text", "parts", "documents"]
RULES: dict[Rule, str] = {
    "none": "none",
    "source": "a split of its own that the source has",
    "text": "the last part of the text",
    "parts": "the last part of each document, because whole ones are too few to choose from",
    "documents": "whole documents, chosen at random",
}
"""What ``validation`` in ``dataset.json`` means."""

FEW = 2
"""Expected number of validation documents below which documents are split instead."""
TOLERANCE = 1.5
"""Factor by which the share of the tokens may differ from the wanted one without a note."""


def choose_rule(source: Source, val_fraction: float, journal: dict[str, Any] | None) -> Rule:
    """How to choose the validation split; an attempt that resumes keeps its rule."""
    if journal is not None and "validation" in journal:
        return cast(Rule, journal["validation"])
    if any(entry.split for entry in source.inputs):
        return "source"
    if not val_fraction:
        return "none"
    if source.whole_files and len(source.inputs) == 1:
        return "text"
    # A journal that names no rule is of a release that chose whole documents.
    if source.whole_files and len(source.inputs) * val_fraction < FEW and journal is None:
        return "parts"
    return "documents"


def divide(source: Source, rule: Rule, val_fraction: float) -> Sequence[Input]:
    """The inputs; those that the rule splits are two inputs each.

    Raises:
        GptDistError: a file cannot be downloaded or read.
    """
    if rule not in ("text", "parts"):
        return source.inputs
    split = split_by_characters if rule == "text" else split_at_line
    return [part for file in source.inputs for part in split(cast(FileInput, file), val_fraction)]


def outcome(info: dict[str, Any]) -> tuple[str, bool]:
    """What became validation, in words, and whether its share is far from the wanted one.

    Args:
        info: the content of ``dataset.json``.
    """
    tokens = {name: entry["tokens"] for name, entry in info["splits"].items()}
    share = tokens.get("val", 0) / sum(tokens.values())
    rule, wanted = info["validation"], info["arguments"]["val_fraction"]
    if rule in ("none", "source"):
        return f"validation: {share:.2%} of the tokens: {RULES[rule]}", False
    far = not wanted / TOLERANCE <= share <= wanted * TOLERANCE
    return f"validation: {share:.2%} of the tokens ({wanted:.2%} wanted): {RULES[rule]}", far
