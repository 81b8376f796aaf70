"""Responses compared with transformers' model with the same weights."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
import transformers

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from serve.client import AsyncClient
from tests.model.test_model import copy_to_transformers
from tests.model.test_nanochat import in_their_names, transformers_model
from tests.serve.conftest import (
    CONTEXT,
    TOKENIZER,
    VOCABULARY,
    LiveServer,
    StartServer,
    tiny_model,
)


@pytest.fixture(scope="module", params=["gpt2", "nanochat"])
def served(request: pytest.FixtureRequest) -> GPT:
    return tiny_model(architecture=request.param)


@pytest.fixture(scope="module")
def reference(served: GPT) -> transformers.PreTrainedModel:
    if served.config.architecture == "nanochat":
        nanochat = transformers_model(served)
        nanochat.load_state_dict(in_their_names(served, dict(served.named_parameters())))
        return nanochat
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_layer=2,
        n_head=2,
        n_embd=32,
        attn_implementation="eager",
    )
    other = transformers.GPT2LMHeadModel(config).eval()
    copy_to_transformers(served, other)
    return other


@pytest.fixture(scope="module")
def server(start: StartServer, served: GPT) -> LiveServer:
    return start(Decoder(served, max_slots=8, dtype="fp32"))


@pytest.mark.slow(5)
def test_greedy_text_of_fifty_callers(
    server: LiveServer, served: GPT, reference: transformers.PreTrainedModel
) -> None:
    """Each token is `generate`'s, and has the largest logit of transformers' model, up to 1e-4."""
    generator = np.random.default_rng(7)
    prompts = [generator.integers(VOCABULARY, size=n).tolist() for n in range(1, 101, 2)]

    async def ask(client: AsyncClient, prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        async for piece in client.stream(
            prompt, max_new_tokens=24, temperature=0.0, ignore_eos=True
        ):
            tokens += piece.token_ids
        return tokens

    async def ask_all() -> list[list[int]]:
        async with AsyncClient(server.target) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    answers = asyncio.run(ask_all())
    assert len(answers) == 50
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert tokens == list(generate(served, prompt, SamplingParams(temperature=0), 24))
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((logits.amax(1) - chosen).max()) < 1e-4


def test_scores_are_transformers(
    server: LiveServer, reference: transformers.PreTrainedModel
) -> None:
    async def score(text: str) -> list[float]:
        async with AsyncClient(server.target) as client:
            response = await client.score(text)
            return [token.logprob for token in response.tokens if token.HasField("logprob")]

    for text in ("to be, or not to be", "Ünïcödé 👩‍🚀 text, to be", "not " * 20):
        ids = torch.tensor([TOKENIZER.encode(text)])
        with torch.no_grad():
            logprobs = reference(ids).logits[0, :-1].double().log_softmax(-1)
        expected = logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()
        np.testing.assert_allclose(asyncio.run(score(text)), expected, atol=1e-4)
