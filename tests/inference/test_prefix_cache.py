"""Where prompts go, and what they reuse there."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gpt_dist.inference.generation import generate_many
from gpt_dist.inference.prefix_cache import ALIGNMENT, MIN_REUSE, Place, PrefixCache
from gpt_dist.inference.sampling import SamplingParams
from tests.fake_decoder import VOCABULARY, expected, fake_decoder

EVERYTHING = 1 << 62


def counting(length: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + length)


def filled(*texts: np.ndarray, slots: int = 4, deterministic: bool = False) -> PrefixCache:
    """A cache with a text in each of the first slots, the first one used longest ago."""
    cache = PrefixCache(slots, 600, deterministic)
    for slot, text in enumerate(texts):
        cache.write(slot, 0, text)
        cache.touch(slot)
    return cache


def lengths(*values: int, slots: int = 4) -> np.ndarray:
    return np.array([*values, *[0] * (slots - len(values))])


def test_longest_is_the_longest_common_prefix() -> None:
    """Random texts over two tokens, compared with a plain search."""
    dice = random.Random(0)
    for _ in range(200):
        stem = [dice.randrange(2) for _ in range(60)]
        texts = [stem[: dice.randrange(61)] + [dice.randrange(2)] * 9 for _ in range(4)]
        cache = filled(*map(np.array, texts))
        usable = [dice.randint(0, len(text)) for text in texts]
        prompt = stem[: dice.randrange(61)]
        best = 0
        for text, most in zip(texts, usable, strict=True):
            pairs = zip(text[:most], prompt, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(most, len(prompt)))
            best = max(best, same)
        slot, length = cache.longest(np.array(prompt, np.int64), np.array(usable))
        assert length == (best if best >= MIN_REUSE else 0)
        assert slot == -1 if length == 0 else texts[slot][:length] == prompt[:length]


def test_chunks_copies_and_steps_are_found() -> None:
    cache = PrefixCache(3, 100)
    cache.write(0, 0, counting(20))
    cache.write(0, 20, counting(10, 20))
    cache.copy(0, 1, 25)
    cache.append([1, 0], np.array([25, 30]), np.array([7, 30]))
    usable = np.array([31, 26, 0])
    assert cache.longest(counting(60), usable) == (0, 31)
    assert cache.longest(np.array([*range(25), 7, 8]), usable) == (1, 26)
    cache.write(0, 10, counting(5, 50))  # begins anew at 10
    assert cache.longest(counting(60), np.array([15, 26, 0])) == (1, 25)


def test_a_conversation_goes_on_in_its_slot() -> None:
    cache = filled(counting(40), counting(50, 100), counting(60, 200))
    usable = lengths(40, 50, 60)
    place = cache.place(counting(80, 100), usable, [0, 1, 2, 3], [0, 1, 2, 3], EVERYTHING)
    assert place == Place(slot=1, source=1, length=50)
    # A few tokens at the end differ, as after a stop sequence.
    prompt = np.array([*range(100, 140), 1, 2, 3])
    place = cache.place(prompt, usable, [0, 1, 2, 3], [0, 1, 2, 3], EVERYTHING)
    assert place == Place(slot=1, source=1, length=40)


def test_a_shared_beginning_is_copied_and_its_owner_keeps_the_rest() -> None:
    cache = filled(counting(100), counting(50, 200), counting(50, 300))
    usable = lengths(100, 50, 50)
    prompt = np.array([*range(40), 9, 9])
    free = [0, 1, 2, 3]
    empty = cache.place(prompt, usable, free, free, EVERYTHING)
    assert empty == Place(slot=3, source=0, length=40, copied=40)
    running = cache.place(prompt, usable, [1, 2], [1, 2], EVERYTHING)
    assert running == Place(slot=1, source=0, length=40, copied=40)  # slot 1 is older than 2
    strange = cache.place(counting(30, 500), usable, [0, 1, 2], [0, 1, 2], EVERYTHING)
    assert strange == Place(slot=0)


def test_what_a_cheap_slot_holds_finds_a_refuge() -> None:
    """Where a step computes all slots up to the highest one, prompts go to low slots."""
    cache = filled(counting(50, 200), counting(40))
    cache.touch(0)
    free, usable = [0, 1, 2, 3], lengths(50, 40)
    place = cache.place(counting(60), usable, free, [0], EVERYTHING)
    assert place == Place(slot=0, source=1, length=40, refuge=2, copied=90)
    # With no empty slot, only what is older gives way.
    cache = filled(counting(50), counting(50, 100), slots=2)
    assert cache.place(counting(9), lengths(50, 50, slots=2), [0, 1], [0], EVERYTHING).refuge == -1
    cache.touch(0)
    assert cache.place(counting(9), lengths(50, 50, slots=2), [0, 1], [0], EVERYTHING).refuge == 1


@pytest.mark.parametrize("most", [0, 15, 16, 39, 40, 89, 90, 200])
def test_no_more_is_copied_than_allowed(most: int) -> None:
    cache = filled(counting(50, 200), counting(40))
    cache.touch(0)
    place = cache.place(counting(60), lengths(50, 40), [0, 1, 2, 3], [0], most)
    assert place.copied <= most
    assert place.length == (min(most, 40) if most >= MIN_REUSE else 0)
    assert (place.refuge >= 0) == (most >= 90 or 50 <= most < MIN_REUSE)


def test_deterministic_reuse_is_of_whole_chunks_that_prefill_computed() -> None:
    cache = filled(counting(300), deterministic=True)
    cache.append([0], np.array([300]), np.array([300]))
    usable = lengths(301)
    assert cache.longest(counting(400), usable) == (0, 2 * ALIGNMENT)
    assert cache.longest(counting(300), usable) == (0, 300)
    assert cache.longest(counting(299), usable) == (0, 299)
    place = cache.place(counting(400), usable, [0, 1], [0, 1], EVERYTHING)
    assert place == Place(slot=0, source=0, length=2 * ALIGNMENT)  # 44 are computed again
    place = cache.place(np.array([*range(290), 1]), usable, [1], [1], 2 * ALIGNMENT - 1)
    assert place == Place(slot=1, source=0, length=ALIGNMENT, copied=ALIGNMENT)


@pytest.mark.parametrize("dense", [False, True])
def test_many_prompts_share_what_they_have_in_common(dense: bool) -> None:
    """`generate_many` finds prefixes as the server does, and its tokens stay the same."""
    decoder, backend = fake_decoder(4, 200, dense)
    stem = [i % VOCABULARY for i in range(100)]
    prompts = [stem + [40 + i] * (i + 1) for i in range(8)] + [[3]]
    sampling = [SamplingParams(seed=seed) for seed in range(9)]
    tokens: list[list[int]] = [[] for _ in prompts]
    for index, token in generate_many(decoder, prompts, sampling, 12):
        tokens[index].append(token)
    for seed, prompt in enumerate(prompts):
        assert tokens[seed] == expected(prompt, seed, 1, 12)
    assert backend.computed == 100 + sum(range(8))
    assert decoder.free_slots == [0, 1, 2, 3]


def test_the_next_turn_copies_nothing_where_all_slots_cost_the_same() -> None:
    decoder, backend = fake_decoder(4, 500)
    talks = [[start, *range(30)] for start in range(40, 44)]
    for turn in range(5):
        for talk in talks:
            computed = backend.computed
            talk += [token for _, token in generate_many(decoder, [talk], [SamplingParams()], 9)]
            assert backend.computed - computed == (30 if turn == 0 else 2)
            talk += [1, 2]
    assert backend.copied == 0


def test_prefixes_are_reused_by_their_owner_alone() -> None:
    prompt = np.arange(50)
    cache = PrefixCache(3, 100)
    lengths = np.array([50, 0, 0])
    cache.write(0, 0, prompt)
    cache.give(0, "one")
    assert cache.longest(prompt, lengths, "one") == (0, 50)
    assert cache.longest(prompt, lengths, "other") == (-1, 0)
    assert cache.longest(prompt, lengths) == (-1, 0)
    stranger = cache.place(prompt, lengths, [0, 1, 2], [0], 1000, "other")
    assert (stranger.slot, stranger.source, stranger.length, stranger.refuge) == (0, -1, 0, 1)
    cache.copy(0, 1, 50)  # the refuge keeps its owner
    cache.give(0, "other")
    lengths[1] = 50
    assert cache.longest(prompt, lengths, "one") == (1, 50)
    assert cache.longest(prompt, lengths, "other") == (0, 50)
