"""Where a long text may be cut so that its parts have the token ids of the whole."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

Cut = Callable[[str, int], int]
"""(text, limit) → the length of the first part, at most ``limit``; 0 where no cut is safe.

The text begins at the start of a document or at an earlier cut.
"""

LOOKAHEAD = 4096
"""Characters after a cut that ``checked_cut`` takes into account."""
CANDIDATES = 8
"""Places of each kind that ``checked_cut`` tries before it gives up."""

# GPT-2's pattern never joins white space to the character before it, and has no look-behind: a cut
# before such white space changes no id. (Python's \s includes all that the tokenizers' \s matches.)
_BEFORE_SPACE = re.compile(r"(?<=\S)[ \t\n\r]")


def gpt2_cut(text: str, limit: int) -> int:
    """The last safe cut for tokenizers that split text by GPT-2's pattern.

    It also serves characters, where every cut is safe.
    """
    for low in (max(0, limit - 4096), 0):
        cuts = [match.start() for match in _BEFORE_SPACE.finditer(text, low, limit + 1)]
        if cuts and cuts[-1] <= limit:
            return cuts[-1]
    # No white space, as in base64 or Chinese. Letters, digits and other signs never share a token,
    # but a sign takes the space before it, and an apostrophe some letters after it.
    return next(_between_kinds(text, limit), 0)


def checked_cut(text: str, limit: int, pieces: Callable[[str], list[Any]]) -> int:
    """A safe cut for any other tokenizer, found by trying.

    A place is safe where the tokenizer makes the same pieces of the two parts as of the whole.
    Pre-tokenizers match from left to right: the first part is compared from its beginning, and
    after a border between two pieces the rest is split as if the text began there. One assumption
    is left: no piece depends on what stands more than ``LOOKAHEAD`` characters after its end.

    Args:
        pieces: the token ids of a text, one group for each piece that is tokenised by itself.
    """
    limit = min(limit, len(text) - LOOKAHEAD)
    if limit <= 0:
        return 0
    spaces = [match.start() for match in _BEFORE_SPACE.finditer(text, 0, limit + 1)]
    for place in (*spaces[-CANDIDATES:][::-1], *islice(_between_kinds(text, limit), CANDIDATES)):
        end = place + LOOKAHEAD
        if pieces(text[:end]) == pieces(text[:place]) + pieces(text[place:end]):
            return place
    return 0


def _between_kinds(text: str, limit: int) -> Iterator[int]:
    """Places between a letter, a number and another sign, the last one first."""
    for place in range(min(limit, len(text) - 1), 0, -1):
        kinds = _kind(text[place - 1]), _kind(text[place])
        if None not in kinds and kinds[0] != kinds[1] and text[place - 1] != "'":
            yield place


def _kind(character: str) -> str | None:
    """Letter, number or sign, as GPT-2's pattern tells them apart; None where unsure."""
    category = unicodedata.category(character)
    if character.isspace() or category in ("Cn", "Cs", "Co"):
        return None
    return category[0] if category[0] in "LN" else "sign"
