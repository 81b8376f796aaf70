"""Generation past the context against a plain loop that runs the model on each window."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gpt_dist.errors import GptDistError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate, generate_many
from gpt_dist.inference.sampling import SamplingParams, uniform
from gpt_dist.model.gpt import GPT
from tests.decoders import SHAPES, small_model

GREEDY = SamplingParams(temperature=0)
CONTEXT = 16
SMALL = {"context_length": CONTEXT}


def windows(prompt: list[int], tokens: list[int], context: int = CONTEXT) -> list[list[int]]:
    """What the model sees before each token: a full window goes on with its last half."""
    window, seen = prompt[-context:], []
    for token in tokens:
        seen.append(list(window))
        window.append(token)
        if len(window) > context:
            window = window[-(context // 2) :]
    return seen


def logits_of(model: GPT, seen: list[list[int]]) -> torch.Tensor:
    """(len(seen), V) logits after each window."""
    return torch.stack([model(torch.tensor([window]))[0, -1] for window in seen])


def assert_greedy(model: GPT, prompt: list[int], tokens: list[int]) -> None:
    """Every token is the argmax for its window, or within 1e-4 of its logit."""
    logits = logits_of(model, windows(prompt, tokens))
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (chosen >= logits.amax(1) - 1e-4).all()


@pytest.mark.slow(2)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_follow_from_their_windows(shape: str, backend: str) -> None:
    model = small_model(**{**SHAPES[shape], **SMALL})
    prompts = [[5], list(range(9)), list(range(CONTEXT)), list(range(40))]
    tokens: list[list[int]] = [[] for _ in prompts]
    decoder = Decoder(model, max_slots=4, dtype="fp32")
    for index, token in generate_many(decoder, prompts, [GREEDY] * 4, 30, past_context=True):
        tokens[index].append(token)
    for prompt, continued in zip(prompts, tokens, strict=True):
        assert len(continued) == 30
        assert_greedy(model, prompt, continued)
    assert decoder.free_slots == [0, 1, 2, 3]


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts(context: int, backend: str) -> None:
    model = small_model(context_length=context)
    tokens = list(generate(model, [1], GREEDY, 12, past_context=True))
    window = [1]
    for token in tokens:
        logits = model(torch.tensor([window]))[0, -1]
        assert logits[token] >= logits.max() - 1e-4
        window.append(token)
        if len(window) > context:
            window = window[-max(1, context // 2) :]
    assert len(tokens) == 12


def test_penalties_and_draws_refer_to_the_whole_sequence(backend: str) -> None:
    """Each draw is that of its place in the sequence; a penalty remembers tokens that left."""
    model, prompt = small_model(vocab_size=40, **SMALL), [3, 1, 4]
    sampling = SamplingParams(
        temperature=0.9, seed=11, repetition_penalty=1.3, frequency_penalty=0.3,
        presence_penalty=0.2, stop_ids=(7,), min_new_tokens=50,
    )  # fmt: skip
    tokens = list(generate(model, prompt, sampling, 50, past_context=True))
    assert len(tokens) == 50
    assert 7 not in tokens
    logits = logits_of(model, windows(prompt, tokens)).double()
    for place, token in enumerate(tokens):
        scores, counts = logits[place], Counter(tokens[:place])
        for known in {*prompt, *counts}:
            score = scores[known]
            scores[known] = score * 1.3 if score < 0 else score / 1.3
        for known, count in counts.items():
            scores[known] -= 0.3 * count + 0.2
        scores[7] = -torch.inf
        mass = (scores / 0.9).softmax(0).cumsum(0)
        draw = uniform(torch.tensor(11), torch.tensor(len(prompt) + place)).item()
        below = mass[token - 1].item() if token else 0.0
        assert below - 1e-4 <= draw <= mass[token].item() + 1e-4, place


def test_a_sample_that_joins_after_another_has_slid_on(backend: str) -> None:
    """The cache of the other one no longer begins with their common prompt."""
    model, prompt = small_model(**SMALL), list(range(7))
    alone = list(generate(model, prompt, GREEDY, 25, past_context=True))
    decoder = Decoder(model, max_slots=2, dtype="fp32")
    # It ends after 20 tokens; then the third one starts beside the first.
    short = SamplingParams(temperature=0, logit_bias={5: 1000}, stop_ids=(5,), min_new_tokens=20)
    tokens: list[list[int]] = [[], [], []]
    jobs = [GREEDY, short, GREEDY]
    for index, token in generate_many(decoder, [prompt] * 3, jobs, 25, past_context=True):
        tokens[index].append(token)
    assert len(tokens[1]) == 20
    assert tokens[2] == tokens[0] == alone


def test_without_it_a_full_context_ends_the_text(backend: str) -> None:
    model = small_model(**SMALL)
    assert len(list(generate(model, [1, 2], GREEDY, 99))) == CONTEXT - 1
    assert len(list(generate(model, list(range(CONTEXT)), GREEDY, 99))) == 1


def test_only_active_slots_slide(backend: str) -> None:
    decoder = Decoder(small_model(**SMALL), max_slots=1, dtype="fp32")
    with pytest.raises(GptDistError, match="slot 0 is not active"):
        decoder.slide(0, [1])
    decoder.prefill(0, [1, 2, 3])
    decoder.activate(0, GREEDY, [1, 2, 3])
    with pytest.raises(GptDistError, match="not active with 4"):
        decoder.slide(0, [1, 2, 3, 4])
