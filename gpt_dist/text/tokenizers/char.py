"""One id per character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt_dist.errors import UsageError
from gpt_dist.text.gpt2_vocabulary import END_OF_TEXT
from gpt_dist.text.tokenizers.base import FORMAT_VERSION, Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray


UNKNOWN = -1


class CharTokenizer(Tokenizer):
    """One id for each character, in code-point order, as in nanoGPT's shakespeare_char.

    Args:
        characters: the vocabulary; sorted and made unique here.
        eot: add an end-of-text token, as the last id.

    Raises:
        UsageError: no characters.
    """

    name = "char"

    def __init__(self, characters: Iterable[str], eot: bool = False) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters) + eot
        self.eot_id = len(self.characters) if eot else None
        if not self.characters:
            raise UsageError("char tokenizer: the text is empty")
        if any("\ud800" <= character <= "\udfff" for character in self.characters):
            raise UsageError("char tokenizer: half of a surrogate pair is not a character")
        # Ids by code point, as an array: encoding is one indexing operation.
        points = _code_points(self.characters)
        self._ids = np.full(int(points[-1]) + 2, UNKNOWN, dtype=np.int32)
        self._ids[points] = np.arange(len(points))

    def encode(self, text: str) -> list[int]:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if len(ids) and ids.min() == UNKNOWN:
            where = int(ids.argmin())
            raise UsageError(
                f"character {text[where]!r} (position {where}) is not among the "
                f"{len(self.characters)} characters of this char tokenizer"
            )
        found: list[int] = ids.tolist()
        return found

    @cached_property
    def _table(self) -> Sequence[bytes]:
        eot = [] if self.eot_id is None else [END_OF_TEXT.encode()]
        return [character.encode() for character in self.characters] + eot

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "type": "char",
            "characters": self.characters,
            "eot": self.eot_id is not None,
        }


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
