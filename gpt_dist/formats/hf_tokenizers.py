"""Tokenizers to and from Hugging Face's files.

All three kinds become a byte-level BPE, as transformers' ``GPT2Tokenizer`` is. For the character
tokenizer that is a BPE whose merges only join the UTF-8 bytes of one character.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.text.gpt2_vocabulary import byte_characters
from gpt_dist.text.tokenizers import (
    END_OF_TEXT,
    BpeTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    Tokenizer,
)

if TYPE_CHECKING:
    import tokenizers

Merges = list[tuple[str, str]]

GPT2_PRE_TOKENIZER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


# --- ours → theirs ------------------------------------------------------------------------------


def tokenizer_files(tokenizer: Tokenizer, context_length: int) -> dict[str, str]:
    """The files from which ``AutoTokenizer`` and ``GPT2Tokenizer`` build an equal tokenizer.

    Args:
        tokenizer: to be written.
        context_length: in tokens, for ``model_max_length``.

    Returns:
        File name → content: tokenizer.json, tokenizer_config.json, vocab.json, merges.txt.
    """
    if isinstance(tokenizer, BpeTokenizer):
        data = tokenizer.to_dict()
        eot, pad = data["eot"], data.get("pad")
        backend_json, content = json.dumps(data["tokenizer"], ensure_ascii=False), data["tokenizer"]
    else:
        eot, pad = None if tokenizer.eot_id is None else END_OF_TEXT, None
        backend_json = _backend(*vocabulary(tokenizer), eot).to_str()
        content = json.loads(backend_json)
    # transformers gives every GPT2Tokenizer GPT-2's pre-tokenizer, so a tokenizer that splits text
    # differently needs the class that keeps tokenizer.json as it is.
    plain = content["pre_tokenizer"] == GPT2_PRE_TOKENIZER and content["normalizer"] is None
    config = {
        "tokenizer_class": "GPT2Tokenizer" if plain else "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        # Explicitly null where there is none: the class would add an <|endoftext|>.
        "bos_token": eot,
        "eos_token": eot,
        "unk_token": eot,
        "pad_token": pad,
    }
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return {
        "tokenizer.json": backend_json,
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "vocab.json": json.dumps(content["model"]["vocab"]),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }


def vocabulary(tokenizer: Tokenizer) -> tuple[dict[str, int], Merges]:
    """Byte-level BPE vocabulary and merges of a gpt2 or char tokenizer."""
    spell = byte_characters()
    table = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    vocab = _spelled(table)
    if isinstance(tokenizer, Gpt2Tokenizer):
        ranks = {piece: token for token, piece in enumerate(table) if token != tokenizer.eot_id}
        return vocab, _recover_merges(ranks)
    # A character of several bytes is merged from the left, beginning with its lead byte. The parts
    # get ids beyond the vocabulary. They remain in the output only for an unknown character.
    merges: Merges = []
    for token, piece in enumerate(table):
        if token == tokenizer.eot_id:
            continue
        letters = [spell[byte] for byte in piece]
        for letter in letters:
            vocab.setdefault(letter, len(vocab))
        for end in range(1, len(letters)):
            left, right = "".join(letters[:end]), letters[end]
            vocab.setdefault(left + right, len(vocab))
            merges.append((left, right))
    return vocab, list(dict.fromkeys(merges))


def _spelled(table: list[bytes]) -> dict[str, int]:
    """The vocabulary in printable characters, one a byte, from each token's bytes."""
    spell = byte_characters()
    return {"".join(spell[byte] for byte in piece): token for token, piece in enumerate(table)}


def _recover_merges(ranks: dict[bytes, int]) -> Merges:
    """Recover the merge rules from tiktoken's ranks.

    Apply to a token's bytes all rules of lower rank. The two tokens that remain are its rule.
    """
    letters = byte_characters()
    spelled = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            first = min(pairs)
            where = pairs.index(first)
            parts[where : where + 2] = [parts[where] + parts[where + 1]]
        if len(parts) == 2:
            merges.append((spelled[parts[0]], spelled[parts[1]]))
    return merges


def _backend(vocab: dict[str, int], merges: Merges, eot: str | None) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    if eot is not None:
        backend.add_special_tokens([eot])
    return backend


# --- theirs → ours ------------------------------------------------------------------------------


def read_tokenizer(directory: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Args:
        directory: where its files are.
        vocab_size: of the model. Ids beyond it are the parts of characters (see ``vocabulary``).

    Returns:
        A ``gpt2`` or ``char`` tokenizer if it equals one, else a ``bpe``.

    Raises:
        UsageError: no tokenizer files, or not a byte-level BPE.
        GptDistError: a file cannot be parsed.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    whole = directory / "tokenizer.json"
    pair = directory / "vocab.json", directory / "merges.txt"
    eot, pad = _special_tokens(directory)
    try:
        if whole.is_file():
            data = json.loads(whole.read_text(encoding="utf-8"))
            backend = Backend.from_str(json.dumps(data))
        elif all(file.is_file() for file in pair):
            backend = _backend(*models.BPE.read_file(*map(str, pair)), eot)
            data = json.loads(backend.to_str())
        else:
            raise UsageError(f"{directory}: no tokenizer.json, and no vocab.json with merges.txt")
    except UsageError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise GptDistError(f"{directory}: the tokenizer cannot be read: {error}") from None
    if data["model"].get("type", "BPE") != "BPE":
        raise UsageError(f"{whole}: a {data['model']['type']} tokenizer; valid is a byte-level BPE")
    if data["pre_tokenizer"] == GPT2_PRE_TOKENIZER and not data["normalizer"]:
        gpt2 = Gpt2Tokenizer()
        if backend.get_vocab() == _spelled([gpt2.token_bytes(t) for t in range(gpt2.vocab_size)]):
            return gpt2
        if characters := _characters(backend, vocab_size, eot):
            return CharTokenizer(characters, eot=backend.token_to_id(eot or "") is not None)
    try:
        return BpeTokenizer(backend, eot or END_OF_TEXT, pad)
    except UsageError as error:
        raise UsageError(f"{directory}: {error}") from None


def _special_tokens(directory: Path) -> tuple[str | None, str | None]:
    """Names of the end-of-text and padding tokens; GPT-2's if no file names them."""
    found: dict[str, Any] = {"eos_token": END_OF_TEXT, "pad_token": None}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            data = json.loads((directory / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise GptDistError(f"{directory / name}: not JSON: {error}") from None
        found |= {key: data[key] for key in found if key in data}
    eot, pad = (v.get("content") if isinstance(v, dict) else v for v in found.values())
    return eot, pad


def _characters(backend: tokenizers.Tokenizer, vocab_size: int | None, eot: str | None) -> str:
    """The characters of a char tokenizer, empty if it is another kind.

    In a char tokenizer every id of the model is one character, in the order of code points.
    """
    letters = {character: byte for byte, character in enumerate(byte_characters())}
    size = vocab_size or backend.get_vocab_size()
    characters: list[str] = []
    for token in range(size):
        piece = backend.id_to_token(token)
        if piece is None:
            return ""
        if piece == eot and token == size - 1:
            continue
        try:
            character = bytes(letters[letter] for letter in piece).decode()
        except (KeyError, UnicodeDecodeError):
            return ""
        if len(character) != 1 or (characters and character <= characters[-1]):
            return ""
        characters.append(character)
    return "".join(characters)
