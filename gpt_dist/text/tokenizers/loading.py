"""The tokenizer of a name, a ``tokenizer.json`` or a directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_dist.errors import UsageError
from gpt_dist.text.tokenizers.base import FILE_NAME, FORMAT_VERSION, Tokenizer
from gpt_dist.text.tokenizers.bpe import BpeTokenizer
from gpt_dist.text.tokenizers.char import CharTokenizer
from gpt_dist.text.tokenizers.gpt2 import Gpt2Tokenizer

if TYPE_CHECKING:
    import tokenizers


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a name (``gpt2``), a ``tokenizer.json``, or a directory that holds one.

    A ``tokenizer.json`` of Hugging Face ``tokenizers`` (byte-level BPE) works as well.

    Raises:
        UsageError: no such file, or not a tokenizer that this version can read.
    """
    if str(name_or_path) == "gpt2":
        return Gpt2Tokenizer()
    path = Path(name_or_path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        data = json.loads(path.read_bytes())
    except OSError:
        raise UsageError(
            f"tokenizer {name_or_path}: no such tokenizer; valid are gpt2, a {FILE_NAME}, "
            "or a directory that has one"
        ) from None
    except ValueError:
        raise UsageError(f"tokenizer {path}: not JSON") from None
    try:
        return _from_dict(data)
    except UsageError as error:
        raise UsageError(f"tokenizer {path}: {error}") from None


def _from_dict(data: Any) -> Tokenizer:
    if not isinstance(data, dict):
        raise UsageError("not a mapping")
    if "model" in data and "added_tokens" in data:
        return BpeTokenizer(_backend(data))
    if data.get("format_version") != FORMAT_VERSION:
        version = data.get("format_version")
        raise UsageError(f"format_version {version!r}; this version reads {FORMAT_VERSION}")
    match data:
        case {"type": "gpt2"}:
            return Gpt2Tokenizer()
        case {"type": "char", "characters": str(characters), "eot": bool(eot)}:
            return CharTokenizer(characters, eot)
        case {"type": "bpe", "tokenizer": dict(backend), "eot": str(name)}:
            pad = data.get("pad")
            return BpeTokenizer(_backend(backend), name, pad if isinstance(pad, str) else None)
    raise UsageError(f"not a gpt2, char or bpe tokenizer (type {data.get('type')!r})")


def _backend(data: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"not a tokenizer of Hugging Face tokenizers: {error}") from None
