"""Tokenizers against independent references: GPT-2's own algorithm, tiktoken, plain UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.text import gpt2_vocabulary
from gpt_dist.text.tokenizers import (
    END_OF_TEXT,
    BpeTokenizer,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)

# White space of all kinds, quotes, digits, marks, emoji with joiners, the end-of-text string.
TRICKY = st.text(
    st.sampled_from([*"ab 'st\n\t\r\x1c\x85\u00a0\u3000019.,!-é\u0301ßж語中、🙂\u200d👩"])
    # Not yet assigned characters mean different things to libraries of different ages.
    | st.characters(exclude_categories=["Cs", "Cn"])
)
TEXTS = st.lists(TRICKY | st.sampled_from([END_OF_TEXT, "'re", "  ", "\n\n"]), max_size=8).map(
    "".join
)
SENTENCE = "It's 2026: naïve café, 東京 and 🙂 don't mix… \n\n  ok\t"


@cache
def small_bpe() -> BpeTokenizer:
    return BpeTokenizer.train([SENTENCE * 3, "the cat sat on the mat\n" * 20], 300)


def every_tokenizer(text: str) -> list[Tokenizer]:
    return [load_tokenizer("gpt2"), small_bpe(), CharTokenizer(text + "x", eot=True)]


def gpt2_reference(text: str) -> list[int]:
    """GPT-2's encoder as published (openai/gpt-2, encoder.py): slow and simple."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = gpt2_vocabulary.merge_ranks()
    ids = []
    for word in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            pairs = [a + b for a, b in pairwise(parts)]
            best = min(pairs, key=lambda pair: ranks.get(pair, 1 << 30))
            if best not in ranks:
                break
            at = 0
            while at < len(parts) - 1:
                if parts[at] + parts[at + 1] == best:
                    parts[at : at + 2] = [best]
                at += 1
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.slow(2)
@given(TEXTS)
@settings(deadline=None, max_examples=200)
def test_gpt2_is_openais_algorithm(text: str) -> None:
    assert load_tokenizer("gpt2").encode(text) == gpt2_reference(text)


def test_gpt2_known_ids() -> None:
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("Hello, I'm a language model,") == [
        15496,
        11,
        314,
        1101,
        257,
        3303,
        2746,
        11,
    ]
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.decode([50256])) == (50257, 50256, END_OF_TEXT)


def test_special_tokens_in_a_text_are_text() -> None:
    assert load_tokenizer("gpt2").encode(END_OF_TEXT) == [27, 91, 437, 1659, 5239, 91, 29]
    bpe = small_bpe()
    ids = bpe.encode(f"a{END_OF_TEXT}<|padding|>")
    assert not {bpe.eot_id, bpe.pad_id} & set(ids)
    assert bpe.decode(ids) == f"a{END_OF_TEXT}<|padding|>"


@pytest.mark.slow(2)
@given(TEXTS)
@settings(deadline=None, max_examples=100)
def test_round_trip_and_byte_lengths(text: str) -> None:
    for tokenizer in every_tokenizer(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.byte_lengths[tokenizer.eot_id or 0] == 0


@pytest.mark.slow(2)
@given(st.lists(TEXTS, max_size=5), st.data())
@settings(deadline=None, max_examples=60)
def test_documents_at_once_equal_one_by_one(texts: list[str], data: st.DataObject) -> None:
    for tokenizer in every_tokenizer("".join(texts)):
        expected: list[int] = []
        for text in texts:
            assert tokenizer.eot_id is not None
            expected += [tokenizer.eot_id, *tokenizer.encode(text)]
        found = tokenizer.encode_documents(texts, [True] * len(texts))
        assert found.dtype == np.uint16
        assert found.tolist() == expected
        assert tokenizer.encode_batch(texts, threads=2) == [tokenizer.encode(t) for t in texts]


@pytest.mark.slow
@given(TEXTS, st.lists(st.integers(0, 2**32), max_size=40), st.data())
@settings(deadline=None, max_examples=200)
def test_stream_decoding_equals_decoding(text: str, noise: list[int], data: st.DataObject) -> None:
    """For any ids, also with broken bytes; only whole characters are returned."""
    for tokenizer in every_tokenizer(text):
        ids = tokenizer.encode(text) + [number % tokenizer.vocab_size for number in noise]
        ids = data.draw(st.permutations(ids)) if data.draw(st.booleans()) else ids
        decoder, pieces = StreamDecoder(tokenizer), []
        for start in range(0, len(ids), size := data.draw(st.integers(1, 3))):
            pieces.append(decoder.push(*ids[start : start + size]))
        pieces.append(decoder.flush())
        assert "".join(pieces) == tokenizer.decode(ids)
    decoder = StreamDecoder(load_tokenizer("gpt2"))
    shown = [decoder.push(token) for token in load_tokenizer("gpt2").encode(text)]
    assert "".join(shown) == text or "\ufffd" in text
    assert decoder.flush() == ""


def test_stream_decoder_holds_back_and_replaces() -> None:
    gpt2 = load_tokenizer("gpt2")
    ids = gpt2.encode("🙂")
    assert len(ids) > 1
    decoder = StreamDecoder(gpt2)
    assert [decoder.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🙂"]
    assert decoder.push(ids[0]) == ""
    assert decoder.flush() == gpt2.decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_saved_and_loaded_is_the_same(which: int, tmp_path: Path) -> None:
    tokenizer = every_tokenizer(SENTENCE)[which]
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(place)
        assert loaded.to_json() == tokenizer.to_json()
        assert loaded.encode(SENTENCE) == tokenizer.encode(SENTENCE)
        assert (loaded.name, loaded.vocab_size, loaded.eot_id) == (
            tokenizer.name,
            tokenizer.vocab_size,
            tokenizer.eot_id,
        )


def test_bpe_is_what_the_library_trains() -> None:
    """Against Hugging Face tokenizers used directly."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT, "<|padding|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator([SENTENCE * 3, "the cat sat on the mat\n" * 20], trainer)
    assert small_bpe().encode(SENTENCE) == backend.encode(SENTENCE).ids
    assert backend.decode(small_bpe().encode(SENTENCE)) == SENTENCE
    assert small_bpe().vocab_size == 300


def test_hugging_face_file_is_understood(tmp_path: Path) -> None:
    """A tokenizer.json as transformers saves it."""
    data = small_bpe().to_dict()["tokenizer"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(SENTENCE) == small_bpe().encode(SENTENCE)
    assert loaded.eot_id == small_bpe().eot_id


def run_python(code: str, **environment: str) -> str:
    keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code], env=keep | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow(2)
def test_bpe_does_not_depend_on_threads() -> None:
    code = (
        "import random, hashlib; from gpt_dist.text.tokenizers import BpeTokenizer\n"
        "r = random.Random(0); words = ['%x' % r.getrandbits(24) for _ in range(3000)]\n"
        "texts = [' '.join(r.choices(words, k=200)) for _ in range(200)]\n"
        "print(hashlib.sha256(BpeTokenizer.train(texts, 900).to_json().encode()).hexdigest())"
    )
    hashes = {run_python(code, RAYON_NUM_THREADS=str(n), PYTHONHASHSEED=str(n)) for n in (1, 2, 3)}
    assert len(hashes) == 1


def test_gpt2_needs_neither_network_nor_cache() -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "from gpt_dist.text.tokenizers import load_tokenizer\n"
        "print(load_tokenizer('gpt2').encode('hello world'))"
    )
    found = run_python(code, HOME="/nonexistent", TIKTOKEN_CACHE_DIR="/nonexistent")
    assert found.strip() == "[31373, 995]"


def test_merge_table_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2_vocabulary.merge_ranks.cache_clear()
    monkeypatch.setattr(gpt2_vocabulary, "R50K_SHA256", "0" * 64)
    with pytest.raises(GptDistError, match=r"gpt2\.tiktoken\.gz: not GPT-2's merge table"):
        load_tokenizer("gpt2").token_bytes(0)


def test_licences_are_shipped() -> None:
    assets = resources.files("gpt_dist.text") / "assets"
    assert "MIT License" in (assets / "gpt2.LICENSE.txt").read_text()
    assert "public domain" in (assets / "README.md").read_text()


def test_char_has_end_of_text_only_where_wanted() -> None:
    plain = CharTokenizer("banana")
    assert (plain.characters, plain.vocab_size, plain.eot_id) == ("abn", 3, None)
    with_eot = CharTokenizer("banana", eot=True)
    assert (with_eot.vocab_size, with_eot.eot_id) == (4, 3)
    assert with_eot.encode("nab") == [2, 0, 1]


def test_a_vocabulary_beyond_16_bits() -> None:
    text = "".join(map(chr, range(0x10000, 0x20000)))
    exact, large = CharTokenizer(text), CharTokenizer(text, eot=True)
    assert exact.encode_documents([text[-2:]], [True]).tolist() == [65534, 65535]
    assert exact.encode_documents([text], [True]).dtype == np.uint16
    ids = large.encode_documents([text[:2], text[-1:]], [True, False])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [65536, 0, 1, 65535]
    assert large.decode(ids.tolist()) == END_OF_TEXT + text[:2] + text[-1:]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: CharTokenizer("abc").encode("abä"), r"'ä' \(position 2\) is not among the 3 char"),
        (lambda: CharTokenizer("abc").encode("ab🙂"), r"'🙂' \(position 2\)"),
        (lambda: CharTokenizer(""), "the text is empty"),
        (lambda: BpeTokenizer.train(["x"], 1 << 21), "2,097,152 tokens; valid are 258 to 1,048,5"),
        (lambda: BpeTokenizer.train(["x"], 257), "valid are 258"),
        (lambda: load_tokenizer("gpt2").decode([50257]), "token id 50257: .* ids 0 to 50256"),
        (lambda: load_tokenizer("gpt2").decode([-1]), "token id -1"),
        (lambda: load_tokenizer("gtp2"), "tokenizer gtp2: no such tokenizer; valid are gpt2"),
    ],
)
def test_what_cannot_be_is_refused(action: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        action()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a mapping"),
        ('{"format_version": 2, "type": "gpt2"}', "format_version 2; this version reads 1"),
        ('{"format_version": 1, "type": "word"}', "not a gpt2, char or bpe tokenizer"),
        ('{"format_version": 1, "type": "char", "characters": 7, "eot": true}', "not a gpt2, char"),
        (
            '{"format_version": 1, "type": "char", "characters": "\\ud800", "eot": true}',
            "surrogate",
        ),
        ('{"format_version": 1, "type": "bpe", "tokenizer": {}, "eot": "x"}', "not a tokenizer of"),
        ('{"model": {}, "added_tokens": []}', "not a tokenizer of Hugging Face"),
    ],
)
def test_damaged_tokenizer_files(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
