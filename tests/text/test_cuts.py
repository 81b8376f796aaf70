"""A cut must never change a token id, whatever pre-tokenizer splits the text."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from gpt_dist.text import cuts
from gpt_dist.text.cuts import gpt2_cut
from gpt_dist.text.tokenizers import END_OF_TEXT, BpeTokenizer, load_tokenizer

LETTERS = [*"ab 'st  \n\n\t\r\x1c\x85\u00a0\u3000\u200b019.,!-é\u0301ßж語中、。🙂\u200d٣½"]
TEXTS = st.text(st.sampled_from(LETTERS) | st.characters(exclude_categories=["Cs"]), max_size=60)
PIECES = st.lists(TEXTS | st.sampled_from(["'re", "don't", "   ", "== "]), max_size=6).map("".join)

gpt2 = load_tokenizer("gpt2")
bpe = BpeTokenizer.train(["don't we're  it's 42 'tis, the  end.\n\n" * 9, "語中、。"], 320)


@pytest.mark.slow
@given(PIECES, st.integers(1, 80))
@settings(deadline=None, max_examples=800)
def test_a_safe_cut_changes_no_id(text: str, limit: int) -> None:
    cut = gpt2_cut(text, limit)
    assert 0 <= cut <= limit
    if cut:
        for tokenizer in (gpt2, bpe):
            parts = tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:])
            assert parts == tokenizer.encode(text)


@pytest.mark.slow(2)
@given(st.text(st.sampled_from([*"a '1.\n!é語\u0301"]), max_size=9), st.integers(1, 9))
@settings(deadline=None, max_examples=500)
def test_a_safe_cut_changes_no_id_in_short_texts(text: str, limit: int) -> None:
    if cut := gpt2_cut(text, limit):
        assert gpt2.encode(text[:cut]) + gpt2.encode(text[cut:]) == gpt2.encode(text)


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("one two three", 8, 7),
        ("one two three", 7, 7),
        ("one two", 6, 3),
        ("one  two", 5, 3),
        ("onetwothree", 8, 0),
        ("    \n\n    ", 8, 0),
        ("abc123", 5, 3),
        ("it's", 3, 2),
        ("語中、語中、", 4, 3),
        ("  one", 4, 0),
    ],
)
def test_where_a_text_is_cut(text: str, limit: int, cut: int) -> None:
    assert gpt2_cut(text, limit) == cut


# --- foreign tokenizers --------------------------------------------------------------------------

CL100K = (  # of cl100k and Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE = "(hello) wörld!\n\n#12345 1234567,(ab)\r\n  don't; \t語、中。Mr. X said 9000\n" * 6
KINDS = ["cl100k", "no pattern", "prefix space", "normalizer", "added token", "none"]


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


@cache
def foreign(kind: str) -> BpeTokenizer:
    """A byte-level BPE that splits text differently from GPT-2, trained so that borders matter."""
    backend = Backend(models.BPE())
    match kind:
        case "cl100k":
            backend.pre_tokenizer = split_by(CL100K)
        case "no pattern":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
        case "prefix space":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "normalizer":
            backend.normalizer = normalizers.Replace(Regex(r"[ \t]*\n"), "\n")
            backend.pre_tokenizer = split_by(CL100K)
        case "added token":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(False)
        case "none":
            backend.pre_tokenizer = split_by(r"[\s\S]+")
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [END_OF_TEXT]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([SAMPLE], trainer)
    if kind == "added token":
        backend.add_tokens([AddedToken("Mr. X", normalized=False)])
    return BpeTokenizer(backend)


BITS = st.sampled_from([*"ab1 29(!,;\n\t語、", "Mr. X", "12345", "hello", "\r\n", "don't", ") "])


@pytest.mark.slow(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_changes_no_id_of_a_foreign_tokenizer(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "LOOKAHEAD", 24)
    tokenizer = foreign(kind)

    @given(st.lists(BITS, max_size=80).map("".join), st.integers(1, 120))
    @settings(deadline=None, max_examples=300)
    def check(text: str, limit: int) -> None:
        cut = tokenizer.safe_cut(text, limit)
        assert 0 <= cut <= limit
        if cut:
            parts = tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:])
            assert parts == tokenizer.encode(text)

    check()


@pytest.mark.slow(2)
@pytest.mark.parametrize("kind", KINDS)
def test_foreign_tokenizers_need_a_rule_of_their_own(kind: str) -> None:
    """GPT-2's changes their ids; theirs finds a cut wherever their pre-tokenizer allows one."""
    tokenizer = foreign(kind)
    wrong = 0
    for limit in range(1, 200):
        cut = gpt2_cut(SAMPLE, limit)
        parts = tokenizer.encode(SAMPLE[:cut]) + tokenizer.encode(SAMPLE[cut:])
        wrong += parts != tokenizer.encode(SAMPLE)
    assert wrong > 0
    text = SAMPLE * 20
    found = tokenizer.safe_cut(text, len(text) - 1)
    assert (found > 0) == (kind not in ("no pattern", "none"))
    assert found <= len(text) - cuts.LOOKAHEAD
