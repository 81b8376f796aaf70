"""Text of token streams: whole characters, exact stops, and no part of a stop leaks."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_dist.text.tokenizers import load_tokenizer
from serve.api.text import TextAssembler

EXAMPLES = 500 if os.environ.get("CI") else 100
GPT2 = load_tokenizer("gpt2")
EMOJI = GPT2.encode("héllo 👩‍🚀 wörld ")  # its tokens are partial characters
tokens = st.lists(st.one_of(st.integers(0, 50256), st.sampled_from(EMOJI)), max_size=30)


def run(ids: list[int], **options: object) -> tuple[list[str], str | None]:
    """The pieces of text of a stream, and the stop sequence that matched."""
    assembler = TextAssembler(GPT2, **options)  # type: ignore[arg-type]
    pieces = []
    for token in ids:
        pieces.append(assembler.push(token))
        if assembler.matched:
            return pieces, assembler.matched
    pieces.append(assembler.flush())
    return pieces, assembler.matched


def cut(text: str, stops: list[str], ignored: int = 0) -> tuple[str, str | None]:
    """The naive rule: the first completed match ends the text, the longest if several."""
    for end in range(ignored + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.slow(2)
@given(tokens)
@settings(max_examples=EXAMPLES)
def test_pieces_are_whole_characters_and_sum_to_the_text(ids: list[int]) -> None:
    pieces, _ = run(ids)
    assert "".join(pieces) == GPT2.decode(ids)
    for piece in pieces:
        piece.encode()  # no lone surrogates


@st.composite
def streams_with_stops(draw: st.DrawFn) -> tuple[list[int], list[str]]:
    """Streams, and stops that mostly occur in them, often across token boundaries."""
    ids = draw(tokens.filter(lambda ids: len(GPT2.decode(ids)) > 0))
    text = GPT2.decode(ids)
    start = st.integers(0, len(text) - 1)
    inside = st.tuples(start, st.integers(1, 8)).map(lambda at: text[at[0] : at[0] + at[1]])
    near = inside.map(lambda stop: stop + "~")  # partial matches, held back and then released
    return ids, draw(st.lists(st.one_of(inside, near, st.text(min_size=1)), min_size=1, max_size=5))


@pytest.mark.slow
@given(streams_with_stops(), st.booleans())
@settings(max_examples=EXAMPLES)
def test_stops_are_cut_exactly_and_never_leak(
    case: tuple[list[int], list[str]], include: bool
) -> None:
    ids, stops = case
    text, stop = cut(GPT2.decode(ids), stops)
    pieces, matched = run(ids, stops=stops, include_stop=include)
    assert matched == stop
    assert "".join(pieces) == (text + stop if include and stop else text)


def test_repeating_stops() -> None:
    """A failed partial match overlaps the real match."""
    for text, stop in (("aaab", "aab"), ("ababac", "abac"), ("xaabaab!", "aabaab"), ("aaaa", "aa")):
        ids = [token for character in text for token in GPT2.encode(character)]
        assert run(ids, stops=[stop])[1] == stop
        assert "".join(run(ids, stops=[stop])[0]) == cut(text, [stop])[0]


@given(st.text(alphabet="ab", max_size=12), st.integers(0, 12))
def test_stops_before_min_tokens_do_not_count(text: str, min_tokens: int) -> None:
    ids = [token for character in text for token in GPT2.encode(character)]
    pieces, matched = run(ids, stops=["aa", "ba"], min_tokens=min_tokens)
    expected, stop = cut(text, ["aa", "ba"], ignored=max(min_tokens - 1, 0))
    assert (matched, "".join(pieces)) == (stop, expected)


def test_held_text_is_as_short_as_it_can_be() -> None:
    assembler = TextAssembler(GPT2, ["###"])
    assert [assembler.push(GPT2.encode(c)[0]) for c in "a#b##c#"] == [
        "a",
        "",
        "#b",
        "",
        "",
        "##c",
        "",
    ]
    assert assembler.flush() == "#"
