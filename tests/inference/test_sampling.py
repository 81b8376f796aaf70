"""Sampling against transformers' own processors, and the hash that draws come from."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from gpt_dist.errors import UsageError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.sampling import SamplingParams, top_values, uniform
from gpt_dist.model.gpt import GPT
from gpt_dist.ops.build import instruction_set
from tests.decoders import BACKENDS, small_model, use_backend

M64 = (1 << 64) - 1


def reference_uniform(seed: int, position: int) -> float:
    """SplitMix64 as published, on Python's integers."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & M64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & M64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix((mix((seed + golden) & M64) + position * golden) & M64) >> 32) / 2**32


def reference_scores(
    logits: torch.Tensor, ids: list[int], prompt: int, params: SamplingParams
) -> torch.Tensor:
    """Processed logits (V,): transformers' processors, and OpenAI's formula for the two others."""
    history, scores = torch.tensor([ids]), logits[None].clone()
    if params.logit_bias:
        bias = {(token,): value for token, value in params.logit_bias.items()}
        scores = transformers.SequenceBiasLogitsProcessor(bias)(history, scores)
    if params.repetition_penalty != 1:
        scores = transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(
            history, scores
        )
    for token in set(ids[prompt:]):
        count = ids[prompt:].count(token)
        scores[0, token] -= params.frequency_penalty * count + params.presence_penalty
    if params.stop_ids and params.min_new_tokens:
        scores = transformers.MinNewTokensLengthLogitsProcessor(
            prompt, params.min_new_tokens, list(params.stop_ids)
        )(history, scores)
    if params.temperature == 0:
        return scores[0]
    scores = transformers.TemperatureLogitsWarper(params.temperature)(history, scores)
    if params.top_k:
        scores = transformers.TopKLogitsWarper(params.top_k)(history, scores)
    if params.top_p < 1:
        scores = transformers.TopPLogitsWarper(params.top_p)(history, scores)
    if params.min_p > 0:
        scores = transformers.MinPLogitsWarper(params.min_p)(history, scores)
    return scores[0]


def random_params(dice: random.Random, vocab_size: int) -> SamplingParams:
    def maybe(value: object, off: object) -> object:
        return value if dice.random() < 0.5 else off

    tokens = range(vocab_size)
    return SamplingParams(
        temperature=dice.choice([0.0, 0.5, 1.0, 1.7]),
        top_k=maybe(dice.choice([1, 2, 7, 50, 250, 400]), 0),
        top_p=maybe(dice.uniform(0.05, 0.99), 1.0),
        min_p=maybe(dice.uniform(0.001, 0.5), 0.0),
        repetition_penalty=maybe(dice.uniform(0.7, 2.0), 1.0),
        presence_penalty=maybe(dice.uniform(-1, 2), 0.0),
        frequency_penalty=maybe(dice.uniform(-1, 2), 0.0),
        logit_bias=maybe({dice.choice(tokens): dice.uniform(-20, 20) for _ in range(5)}, {}),
        min_new_tokens=maybe(3, 0),
        stop_ids=tuple(dice.sample(tokens, 40)),
        seed=dice.getrandbits(64),
        logprobs=maybe(dice.choice([0, 1, 5, 20]), None),
    )


@pytest.mark.slow(2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_those_of_transformers_processors(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty slots with parameters of their own at once, for twelve steps."""
    use_backend(backend, monkeypatch)
    model, dice = small_model(), random.Random(1)
    decoder = Decoder(model, max_slots=40, dtype="fp32")
    params = [random_params(dice, model.vocab_size) for _ in range(40)]
    ids = [[dice.randrange(model.vocab_size) for _ in range(slot + 1)] for slot in range(40)]
    for slot in range(40):
        decoder.prefill(slot, ids[slot])
        decoder.activate(slot, params[slot], ids[slot])
    unsure = 0
    for _ in range(12):
        result = decoder.step()
        assert result.slots == list(range(40))
        for slot, token, logprob, top in zip(
            result.slots, result.tokens, result.logprobs, result.top, strict=True
        ):
            logits = model(torch.tensor([ids[slot]]))[0, -1]
            scores = reference_scores(logits, ids[slot], slot + 1, params[slot])
            if params[slot].temperature == 0:
                assert scores[token] > scores.max() - 1e-4
            else:
                mass = scores.double().softmax(0).cumsum(0).numpy()
                u = reference_uniform(params[slot].seed, len(ids[slot])) * mass[-1]
                expected = int(np.searchsorted(mass, u, side="right"))
                if token != expected:  # only where the draw falls on the edge of two tokens
                    edges = [mass[index] for index in (token - 1, token) if index >= 0]
                    assert min(abs(u - edge) for edge in edges) < 1e-5
                    unsure += 1
            check_logprobs(logits, token, logprob, top, params[slot])
            ids[slot].append(token)
    assert unsure <= 2


def check_logprobs(logits, token, logprob, top, params) -> None:
    expected = logits.log_softmax(0)
    if params.logprobs is None:
        assert logprob is None
        assert top == []
        return
    assert logprob == pytest.approx(float(expected[token]), abs=1e-5)
    best = expected.topk(params.logprobs)
    assert [entry[0] for entry in top] == best.indices.tolist()
    assert [entry[1] for entry in top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("least", [1e-30, 1e-38, 1e-40, 1e-50, 5e-324])
def test_the_smallest_divisors(least: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temperature near 0 takes the most likely token; a penalty near 0 takes a token again."""
    use_backend(backend, monkeypatch)
    model = small_model()
    decoder = Decoder(model, max_slots=6, dtype="fp32")
    prompt = [5, 6, 7]
    best = int(model(torch.tensor([prompt]))[0, -1].argmax())
    params = [
        SamplingParams(temperature=least, seed=1, logprobs=1),
        SamplingParams(temperature=least, seed=2, top_k=7),
        SamplingParams(temperature=least, seed=3, top_p=0.9),
        SamplingParams(temperature=least, seed=4, min_p=0.1),
        SamplingParams(temperature=least, repetition_penalty=least, logit_bias={5: 100}),
        SamplingParams(repetition_penalty=least, logit_bias={5: 100}),
    ]
    for slot, one in enumerate(params):
        decoder.prefill(slot, prompt)
        decoder.activate(slot, one, prompt)
    result = decoder.step()
    assert result.tokens == [best] * 4 + [5, 5]
    assert math.isfinite(result.logprobs[0] or math.nan)


def test_both_backends_choose_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, which adds the same numbers in another order."""
    model = small_model()
    streams = []
    for backend in BACKENDS:
        use_backend(backend, monkeypatch)
        decoder, dice = Decoder(model, max_slots=64, dtype="fp32"), random.Random(5)
        for slot in range(64):
            ids = [dice.randrange(model.vocab_size) for _ in range(slot + 1)]
            decoder.prefill(slot, ids)
            decoder.activate(slot, random_params(dice, model.vocab_size), ids)
        streams.append([decoder.step().tokens for _ in range(30)])
    assert streams[0] == streams[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(backend, monkeypatch)
    name = Decoder(small_model(), max_slots=1).backend
    assert name == ("pytorch" if backend == "torch" else f"kernels-{instruction_set()}")


@pytest.mark.slow(2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_follow_the_distribution(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 first tokens of different seeds: chi-square against the softmax."""
    use_backend(backend, monkeypatch)
    model = small_model(n_layer=0, vocab_size=11, n_embd=4, n_head=1)
    decoder = Decoder(model, max_slots=500, dtype="fp32")
    counts = np.zeros(11)
    for seed in range(40):
        for slot in range(500):
            decoder.prefill(slot, [])
            decoder.activate(slot, SamplingParams(seed=500 * seed + slot), [3])
        counts += np.bincount(decoder.step().tokens, minlength=11)
        for slot in range(500):
            decoder.free(slot)
    expected = model(torch.tensor([[3]]))[0, -1].double().softmax(0).numpy() * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 30  # p = 0.0009 with 10 degrees


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_drawn(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all real tokens are far less likely than the padding's logit of 0."""
    use_backend(backend, monkeypatch)
    model: GPT = small_model(n_layer=0, vocab_size=5, n_embd=4, n_head=1, tie_embeddings=False)
    with torch.no_grad():
        model.wte.weight[:5] = 1
        model.lm_head.weight[:5] = -10
    decoder = Decoder(model, max_slots=64, dtype="fp32")
    for slot in range(64):
        temperature = 0.0 if slot % 8 == 0 else 2.0
        decoder.activate(slot, SamplingParams(temperature=temperature, seed=slot, logprobs=9), [1])
    for _ in range(20):
        result = decoder.step()
        assert max(result.tokens) < 5
        assert all(token < 5 for top in result.top for token, _ in top)
        assert len(result.top[0]) == 5


def test_uniform_is_splitmix() -> None:
    dice = random.Random(0)
    seeds = [0, 1, M64, *(dice.getrandbits(64) for _ in range(200))]
    positions = [0, 1, 1023, *(dice.randrange(1024) for _ in range(200))]
    signed = [seed - (1 << 64) if seed >= 1 << 63 else seed for seed in seeds]
    drawn = uniform(torch.tensor(signed), torch.tensor(positions)).tolist()
    assert drawn == [reference_uniform(s, p) for s, p in zip(seeds, positions, strict=True)]


def test_uniform_is_uniform_over_seeds_and_positions() -> None:
    for seeds, positions in [
        (torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64)),
        (torch.zeros(100_000, dtype=torch.int64), torch.arange(100_000)),
    ]:
        drawn = uniform(seeds, positions).numpy()
        counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 150  # p = 0.0007 with 99 degrees
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("columns", [1, 7, 128, 5000, 50257])
def test_top_values_are_topk(columns: int) -> None:
    scores = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    for count in (1, 5, 50):
        expected = scores.topk(min(count, columns), dim=1).values
        assert torch.equal(top_values(scores, count), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.1), ("min_p", 2.0), ("repetition_penalty", 0.0), ("presence_penalty", 1e9),
        ("frequency_penalty", math.nan), ("logit_bias", {1: math.inf}), ("seed", -1),
        ("seed", 1 << 64), ("min_new_tokens", -1), ("logprobs", 1000),
    ],
)  # fmt: skip
def test_values_out_of_range_name_the_field(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{name} = "):
        replace(SamplingParams(), **{name: value})
