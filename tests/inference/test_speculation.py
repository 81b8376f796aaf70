"""Guessing changes how fast tokens come, never which."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_dist.inference.backends import DType
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate_many
from gpt_dist.inference.lookup import NGRAMS, Follower, Memories, Memory
from gpt_dist.inference.results import Chosen
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.inference.speculation import Speculator, StepTimes
from tests.decoders import SHAPES, small_model, use_backend

COUNT = 10_000 if os.environ.get("SOAK") else 60
"""Generations with each dtype of the weights."""

small_texts = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend("kernels", monkeypatch)


@given(small_texts, st.lists(small_texts, max_size=4))
def test_a_guess_is_what_followed_an_earlier_occurrence(
    text: list[int], outputs: list[list[int]]
) -> None:
    memory = Memory()
    for output in outputs:
        memory.add(output)
    follower = Follower(memory)
    follower.extend(text)

    def ends(place: list[int], length: int) -> list[int]:
        """Where the last tokens of the text occur, and something follows."""
        last = text[len(text) - length :]
        return [n for n in range(length, len(place)) if place[n - length : n] == last]

    agree, guess = follower.agree, follower.guess(8)
    own = [[text[end + n % (len(text) - end)] for n in range(8)] for end in ends(text, agree)]
    others = [output[end : end + 8] for output in outputs for end in ends(output, agree)]
    assert guess in own + others if agree else not guess
    for length in (size for size in NGRAMS if size <= len(text)):
        known = [*outputs, text] if length == NGRAMS[0] else [text]
        assert agree >= length or not any(ends(place, length) for place in known)


def test_what_memory_does_not_keep_is_not_found() -> None:
    memory = Memory(size=6)
    memory.add([1, 2, 3, 4, 5])
    follower = Follower(memory)
    memory.add([6, 7])
    assert memory.tokens == [1, 2, 3, 4, 5, -1, 6, 7, -1]
    follower.extend([1, 2, 3, 4])
    assert follower.guess(9) == [5]
    memory.add([8, 9, 10])
    assert memory.tokens == [7, -1, 8, 9, 10, -1]
    assert follower.guess(9) == [5]
    later = Follower(memory)
    later.extend([1, 2, 3, 4])
    assert later.guess(9) == []


@pytest.fixture
def free_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes as long with any number of rows: all that can be guessed is."""
    monkeypatch.setattr(StepTimes, "estimate", lambda self, rows: np.ones(rows + 1))


def mixed_params(dice: random.Random, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=dice.choice((0, 0.2, 1.0)),
        top_k=dice.choice((0, 3, 50)),
        top_p=dice.choice((1.0, 0.8)),
        repetition_penalty=dice.choice((1.0, 1.0, 1.2)),
        frequency_penalty=dice.choice((0.0, 0.0, 0.3)),
        logit_bias=dice.choice(({}, {7: 2.0})),
        min_new_tokens=dice.choice((0, 9)),
        stop_ids=dice.choice(((), (5, 11))),
        logprobs=dice.choice((None, 0, 3)),
        seed=seed,
    )


def mixed_prompt(dice: random.Random) -> list[int]:
    """Random tokens, or a passage that repeats."""
    ids = [dice.randrange(301) for _ in range(dice.randint(1, 20))]
    return ids * dice.choice((1, 2, 4))


def streams(
    decoder: Decoder, prompts: list[list[int]], params: list[SamplingParams], count: int
) -> tuple[list[list[Chosen]], int]:
    """All that a decoder says of each prompt's continuation, and how many tokens were guessed."""
    rows: list[list[Chosen]] = [[] for _ in prompts]
    guessed = 0
    for slot, (ids, sampling) in enumerate(zip(prompts, params, strict=True)):
        decoder.prefill(slot, ids[:-1])
        decoder.activate(slot, sampling, ids)
    while decoder.active_slots:
        result = decoder.step()
        for slot, *row, last in zip(
            result.slots, result.tokens, result.logprobs, result.top, result.last, strict=True
        ):
            if slot not in decoder.active_slots:
                continue
            rows[slot].append(tuple(row))
            guessed += not last
            stopped = row[0] in params[slot].stop_ids
            if stopped or len(rows[slot]) == count or (last and not decoder.room(slot)):
                decoder.free(slot)
    return rows, guessed


@pytest.mark.slow(5)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("gpt2", "fp32"), ("gpt2", "bf16"), ("gpt2", "int8"), ("nanochat", "bf16")],
)
def test_tokens_and_logprobs_are_those_without_guesses(
    shape: str, dtype: DType, free_rows: None
) -> None:
    """Greedy and drawn, with every processor, alone and in company, to the context's end."""
    plain, guessing = (
        Decoder(small_model(**SHAPES[shape]), max_slots=5, dtype=dtype, speculate=speculate)
        for speculate in (False, True)
    )
    generated = total = guessed = 0
    while generated < COUNT:
        dice = random.Random(generated)
        batch = dice.choice((1, 5))
        prompts = [mixed_prompt(dice) for _ in range(batch)]
        params = [mixed_params(dice, generated + index) for index in range(batch)]
        count = dice.choice((10, 60))
        expected, none = streams(plain, prompts, params, count)
        found, accepted = streams(guessing, prompts, params, count)
        assert found == expected
        assert none == 0
        generated, guessed = generated + batch, guessed + accepted
        total += sum(map(len, found))
    assert guessed > total / (20 if shape == "gpt2" else 100)  # random nanochats repeat less


def test_wrong_guesses_change_nothing(free_rows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also half right ones, at every place of the guess and of the context."""
    model = small_model()
    params = [SamplingParams(seed=n, temperature=n % 2) for n in range(3)]
    prompts = [[n, n + 1, n + 2] for n in range(3)]

    def run(speculate: bool) -> list[tuple[int, int]]:
        decoder = Decoder(model, max_slots=3, dtype="bf16", speculate=speculate)
        return sorted(generate_many(decoder, prompts, params, 200, past_context=True))

    expected = run(False)
    streams = {tuple(prompts[i]): [t for n, t in expected if n == i] for i in range(3)}
    dice = random.Random(0)

    def half_right(follower: Follower, count: int) -> list[int]:
        ids = follower.tokens
        for prompt, stream in streams.items():
            text = [*prompt, *stream]
            for end in range(len(text), 0, -1):
                if text[:end][-len(ids) :] == ids[-end:]:
                    right = text[end : end + count // 2]
                    return [*right, *(dice.randrange(301) for _ in range(count - len(right)))]
        return [dice.randrange(301) for _ in range(count)]

    monkeypatch.setattr(Follower, "guess", half_right)
    monkeypatch.setattr(Follower, "chance", lambda self, index=0: 1.0)
    assert run(True) == expected


class Clock:
    """Time that passes by a given cost of a step."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def follow(text: list[int], cost: Callable[[int], float], start: int = 2) -> tuple[int, float, int]:
    """Decode a known text with guesses: steps, seconds, and steps in which guesses were sought."""
    clock = Clock()
    speculator = Speculator(1, 128, clock)
    speculator.begin(0)
    at, steps, searches = start, 0, 0

    def news(slot: int, begin: int) -> list[int]:
        nonlocal searches
        searches += 1
        return text[begin:at]

    def room(slot: int) -> int:
        return len(text) - at - 1

    while at < len(text):
        guesses = speculator.propose([0], news, room)
        guess = guesses.get(0, [])
        clock.now += cost(1 + len(guess))
        right = 0
        while right < len(guess) and guess[right] == text[at + right]:
            right += 1
        speculator.learn()
        at, steps = at + right + 1, steps + 1
    return steps, clock.now, searches


def test_guesses_are_long_where_rows_are_cheap_and_none_where_they_cost() -> None:
    dice = random.Random(0)
    period = [dice.randrange(300) for _ in range(20)]
    loop, noise = period * 30, [dice.randrange(300) for _ in range(600)]
    memory_bound: Callable[[int], float] = lambda rows: 1 + 0.01 * rows  # noqa: E731
    compute_bound: Callable[[int], float] = float
    steps, seconds, _ = follow(loop, memory_bound)
    assert steps < 100
    assert seconds < 0.25 * 598 * 1.01
    steps, seconds, searches = follow(loop, compute_bound)
    assert seconds < 1.02 * 598
    assert searches < 30  # no guess could pay, and that is known soon
    for cost in (memory_bound, compute_bound):
        assert follow(noise, cost)[1] < 1.01 * 598 * cost(1)


def test_a_loop_that_begins_and_ends_is_noticed() -> None:
    dice = random.Random(1)
    noise = [dice.randrange(300) for _ in range(300)]
    steps, _, _ = follow(
        [*noise, *[1, 2, 3, 4, 5] * 60, *noise[::-1]], lambda rows: 1 + 0.02 * rows
    )
    assert steps + 280 > 598
    assert steps < 720


def test_a_disturbed_first_measurement_does_not_end_guessing() -> None:
    loop = [1, 2, 3, 4, 5] * 40
    wide = 0

    def cost(rows: int) -> float:
        nonlocal wide
        wide += rows > 1
        return 3.0 if wide == 1 and rows > 1 else 1 + 0.01 * rows

    assert follow(loop, cost)[0] < 60


def test_times_of_steps() -> None:
    times = StepTimes(keep=3, stale=20)
    assert np.isinf(times.estimate(4)).all()
    times.add(1, 10.0)
    assert times.estimate(4).tolist() == [10, 10, 10, np.inf, np.inf]
    for expected in (12, 14, 16):  # believed by and by
        times.add(4, 16.0)
        assert times.estimate(4)[4] == expected
    assert times.estimate(9).tolist() == [10, 10, 12, 14, 16, 18, 20, 22, 24, np.inf]
    for seconds in (90.0, 16.0, 16.0):  # one disturbed step
        times.add(4, seconds)
    assert times.estimate(4)[4] == 16
    for _ in range(3):
        times.add(2, 99.0)  # more rows took less time: it was something else
    assert times.estimate(4)[2] == 16
    for _ in range(60):
        times.add(1, 10.0)
    assert times.estimate(2).tolist() == [10, 10, 10]  # the others are forgotten


def test_times_are_compared_at_the_pace_of_their_moment() -> None:
    times = StepTimes()
    for rows, seconds in ((1, 10.0), (1, 20.0), (2, 24.0), (1, 10.0)):  # slow for a while
        for _ in range(5):
            times.add(rows, seconds)
    assert times.estimate(2)[1:].tolist() == pytest.approx([10, 12])


def test_earlier_outputs_of_a_caller_are_guessed_from(free_rows: None) -> None:
    decoder = Decoder(small_model(), max_slots=1, dtype="fp32", speculate=True)
    params = SamplingParams(seed=3)
    memories = Memories(size=2)

    def steps(caller: str) -> int:
        decoder.prefill(0, [4, 5])
        decoder.activate(0, params, [4, 5, 6], memories.of(caller))
        tokens: list[int] = []
        count = 0
        while len(tokens) < 60:
            tokens += decoder.step().tokens
            count += 1
        if memory := memories.of(caller):
            memory.add(tokens)
        decoder.free(0)
        return count

    alone = steps("a")
    assert steps("a") < alone / 2
    assert steps("b") == alone
    assert steps("") == steps("") == alone
    assert memories.of("c") is not memories.of("b")
    assert steps("a") == alone  # forgotten: there are only two


def test_no_guesses_on_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the result of a row depends in its last bits on how many rows there are."""
    use_backend("torch", monkeypatch)
    assert Decoder(small_model(), max_slots=1, dtype="fp32", speculate=True).speculator is None
