"""The decoder against full forward passes of the model, on every backend."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.inference import cpu_kernels as kernels
from gpt_dist.inference.cpu_backend import CpuBackend
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate, generate_many, score
from gpt_dist.inference.results import Scores
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.inference.torch_backend import TorchBackend
from gpt_dist.model.gpt import GPT
from tests.conftest import break_compiler
from tests.decoders import ARCHITECTURES, SHAPES, small_model, use_backend
from tests.fake_decoder import expected, fake_decoder

GREEDY = SamplingParams(temperature=0)


def random_prompts(model: GPT, count: int, longest: int, seed: int = 0) -> list[list[int]]:
    dice = random.Random(seed)
    return [
        [dice.randrange(model.vocab_size) for _ in range(dice.randint(1, longest))]
        for _ in range(count)
    ]


def assert_greedy(model: GPT, prompt: list[int], tokens: list[int]) -> None:
    """Every token is the argmax of an uncached pass, or within 1e-4 of its logit."""
    logits = model(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (chosen >= logits.amax(1) - 1e-4).all()


def start(decoder: Decoder, slot: int, ids: list[int], sampling: SamplingParams) -> None:
    decoder.prefill(slot, ids)
    decoder.activate(slot, sampling, ids)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_the_uncached_model(shape: str, backend: str) -> None:
    model = small_model(**SHAPES[shape])
    prompts = random_prompts(model, 8, 40)
    decoder = Decoder(model, max_slots=8, dtype="fp32")
    tokens: list[list[int]] = [[] for _ in prompts]
    for index, token in generate_many(decoder, prompts, [GREEDY] * 8, 30):
        tokens[index].append(token)
    for prompt, continued in zip(prompts, tokens, strict=True):
        assert len(continued) == 30
        assert_greedy(model, prompt, continued)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_scores_are_those_of_the_model(shape: str, dtype: Any, backend: str) -> None:
    """fp32 up to rounding; bf16 and int8 up to their measured errors and a margin."""
    model = small_model(**SHAPES[shape])
    ids = random_prompts(model, 1, 1)[0] + random_prompts(model, 1, 90, seed=5)[0] * 3
    ids = ids[:96]
    expected = model(torch.tensor([ids]))[0].log_softmax(1)
    decoder = Decoder(model, max_slots=1, dtype=dtype)
    scores = join(score(decoder, ids, top=4))
    own = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    off = np.abs(scores.logprobs - own)
    if dtype == "fp32":
        assert off.max() < 2e-5
        best = expected[:-1].topk(4)
        assert np.abs(scores.top_logprobs - best.values.numpy()).max() < 2e-5
        assert (scores.top_ids == best.indices.numpy()).mean() > 0.99  # near ties may swap
    else:
        spread = expected.std().item()
        assert off.mean() < (0.01 if dtype == "bf16" else 0.03) * spread


def join(parts: Iterator[Scores]) -> Scores:
    every = list(parts)
    assert [part.start for part in every] == np.cumsum(
        [1] + [len(part.logprobs) for part in every[:-1]]
    ).tolist()
    names = ("logprobs", "top_ids", "top_logprobs")
    return Scores(1, *(np.concatenate([getattr(part, name) for part in every]) for name in names))


@ARCHITECTURES
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_chunks_do_not_matter(shape: str, dtype: Any, backend: str) -> None:
    """Log-probabilities for any division of the prompt; the kernels' are bitwise equal."""
    model, dice = small_model(**SHAPES[shape]), random.Random(0)
    ids = random_prompts(model, 1, 1)[0] + list(range(80))
    outcomes = []
    for chunk in (81, 80, 1, 7, 16, None):
        decoder = Decoder(model, max_slots=2, dtype=dtype)
        at = 0
        while at < len(ids):
            size = chunk or dice.randint(1, 20)
            decoder.prefill(1, ids[at : at + size], at)
            at += size
        decoder.activate(1, SamplingParams(temperature=0, logprobs=20), ids)
        outcomes.append([decoder.step() for _ in range(5)])
    for outcome in outcomes[1:]:
        if backend == "kernels":
            assert outcome == outcomes[0]
        else:
            tolerance = 1e-5 if dtype == "fp32" else 0.05
            for one, other in zip(outcome, outcomes[0], strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


def test_fifty_prompts_of_mixed_length_join_and_leave(backend: str) -> None:
    """Sequences join and leave at random; seven slots are all reused many times."""
    model, dice = small_model(), random.Random(3)
    prompts = random_prompts(model, 50, 60)
    lengths = [dice.randint(1, 30) for _ in prompts]
    decoder = Decoder(model, max_slots=7, dtype="fp32")
    waiting, running, tokens = list(range(50)), dict[int, int](), [list[int]() for _ in prompts]
    while waiting or running:
        while waiting and decoder.free_slots and dice.random() < 0.6:
            index, slot = waiting.pop(), dice.choice(decoder.free_slots)
            start(decoder, slot, prompts[index], GREEDY)
            running[slot] = index
        result = decoder.step()
        assert result.slots == sorted(running)
        for slot, token in zip(result.slots, result.tokens, strict=True):
            index = running[slot]
            tokens[index].append(token)
            if len(tokens[index]) == lengths[index]:
                decoder.free(slot)
                del running[slot]
    for prompt, continued, length in zip(prompts, tokens, lengths, strict=True):
        assert len(continued) == length
        assert_greedy(model, prompt, continued)


@pytest.mark.slow(2)
@ARCHITECTURES
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_sequence_is_the_same_alone_and_among_31_others(
    shape: str, dtype: Any, backend: str
) -> None:
    model = small_model(**SHAPES[shape])
    prompts = random_prompts(model, 32, 50)
    sampling = [SamplingParams(top_k=40, top_p=0.95, seed=s, logprobs=3) for s in range(32)]

    def run(slots: dict[int, int]) -> dict[int, list[Any]]:
        """Outcomes by prompt; ``slots`` maps slots to prompts, which join one step apart."""
        decoder = Decoder(model, max_slots=32, dtype=dtype, deterministic=True)
        outcomes: dict[int, list[Any]] = {index: [] for index in slots.values()}
        joining = list(slots.items())
        while min(map(len, outcomes.values())) < 20:
            if joining:
                slot, index = joining.pop()
                start(decoder, slot, prompts[index], sampling[index])
            result = decoder.step()
            for slot, *outcome in zip(
                result.slots, result.tokens, result.logprobs, result.top, strict=True
            ):
                outcomes[slots[slot]].append(outcome)
                if len(outcomes[slots[slot]]) == 20:
                    decoder.free(slot)
        return outcomes

    together = run({slot: (slot * 5) % 32 for slot in range(32)})
    for index in (0, 13, 31):
        assert run({index: index})[index] == together[index]


@ARCHITECTURES
def test_copied_prefix_continues_as_if_prefilled(shape: str, backend: str) -> None:
    model = small_model(**SHAPES[shape])
    decoder = Decoder(model, max_slots=4, dtype="fp32")
    shared, tails = list(range(37)), [[5, 6], [7], [8, 9, 10]]
    decoder.prefill(0, shared)
    for slot, tail in enumerate(tails, start=1):
        decoder.copy_prefix(0, slot, 37 - slot)
        assert decoder.length(slot) == 37 - slot
        decoder.prefill(slot, (shared + tail)[37 - slot :], 37 - slot)
        decoder.activate(slot, GREEDY, shared + tail)
    decoder.activate(0, GREEDY, shared)
    results = [decoder.step() for _ in range(10)]
    for slot, tail in enumerate([[], *tails]):
        assert_greedy(model, shared + tail, [result.tokens[slot] for result in results])


@ARCHITECTURES
def test_a_full_slot_stands_beside_an_active_one(shape: str, backend: str) -> None:
    """Its row is computed on PyTorch, at a position that the model does not have."""
    model = small_model(**SHAPES[shape])
    decoder = Decoder(model, max_slots=2, dtype="fp32")
    decoder.prefill(0, list(range(decoder.max_context)))
    start(decoder, 1, [1, 2, 3], GREEDY)
    assert_greedy(model, [1, 2, 3], [decoder.step().tokens[0] for _ in range(5)])


def test_a_freed_slot_can_go_on_from_what_it_cached(backend: str) -> None:
    model = small_model()
    decoder = Decoder(model, max_slots=1, dtype="fp32")
    ids = list(range(20))
    start(decoder, 0, ids, GREEDY)
    tokens = [decoder.step().tokens[0] for _ in range(10)]
    decoder.free(0)
    assert decoder.free_slots == [0]
    assert decoder.length(0) == 29  # the last token was never run
    following = ids + tokens[:5] + [1, 2, 3]
    decoder.prefill(0, following[25:], 25)
    decoder.activate(0, GREEDY, following)
    assert_greedy(model, following, [decoder.step().tokens[0] for _ in range(10)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kept", [20, 25])
def test_what_a_slot_cached_beyond_a_kept_prefix_is_gone(
    kept: int, dtype: Any, backend: str
) -> None:
    """A bf16 cache stores positions in pairs; a prefix of odd length ends within one."""
    model = small_model()
    ids = list(range(40))
    following = [*ids[:kept], 90, 91, 92]
    steps = []
    for cached in (ids, ids[:kept]):
        decoder = Decoder(model, max_slots=1, dtype=dtype, deterministic=True)
        decoder.prefill(0, cached)
        decoder.prefill(0, following[kept:], kept)
        decoder.activate(0, SamplingParams(temperature=0, logprobs=20), following)
        steps.append([decoder.step() for _ in range(5)])
    assert steps[0] == steps[1]


def test_sequences_end_on_the_weights_that_they_began_with(backend: str) -> None:
    old, new = small_model(seed=0), small_model(seed=1)
    decoder = Decoder(old, max_slots=3, dtype="fp32")
    prompts = random_prompts(old, 3, 20)
    start(decoder, 0, prompts[0], GREEDY)
    start(decoder, 2, prompts[2], GREEDY)
    tokens = [[decoder.step().tokens[0] for _ in range(3)], [], []]
    decoder.free(2)
    decoder.use(decoder.load_weights(new))
    assert decoder.length(2) == 0  # computed by the old weights: not to be reused
    assert decoder.version(0) < decoder.weights.version
    start(decoder, 1, prompts[1], GREEDY)
    for _ in range(8):
        result = decoder.step()
        assert result.slots == [0, 1]
        tokens[0].append(result.tokens[0])
        tokens[1].append(result.tokens[1])
    assert_greedy(old, prompts[0], tokens[0])
    assert_greedy(new, prompts[1], tokens[1])
    decoder.free(0)
    assert decoder.version(0) == 0


def test_other_weights_must_have_the_same_shape(backend: str) -> None:
    decoder = Decoder(small_model(), max_slots=1)
    with pytest.raises(UsageError, match=r"model\.n_head = 2"):
        decoder.load_weights(small_model(n_head=2))


@pytest.mark.parametrize("deterministic", [False, True])
def test_scoring_and_running_slots_do_not_disturb_each_other(
    backend: str, deterministic: bool
) -> None:
    model = small_model()
    decoder = Decoder(model, max_slots=3, dtype="fp32", deterministic=deterministic)
    prompt, text = list(range(30)), list(range(96))[::-1]
    start(decoder, 2, prompt, GREEDY)
    tokens, logprobs = [], []
    for part in score(decoder, text, chunk=10):
        assert decoder.free_slots == [1]
        logprobs += part.logprobs.tolist()
        tokens.append(decoder.step().tokens[0])
    assert_greedy(model, prompt, tokens)
    targets = torch.tensor(text[1:])
    expected = -F.cross_entropy(model(torch.tensor([text[:-1]]))[0], targets, reduction="none")
    assert logprobs == pytest.approx(expected.tolist(), abs=2e-5)
    next(scoring := score(decoder, text, chunk=10))
    scoring.close()
    assert len(list(score(decoder, text, chunk=95))) == 1
    start(decoder, 0, prompt, GREEDY)
    start(decoder, 1, prompt, GREEDY)
    with pytest.raises(GptDistError, match="no slot is free to score"):
        next(score(decoder, text))


def test_generate_ends_at_stop_tokens_limits_and_the_context(backend: str) -> None:
    model = small_model()
    tokens = list(generate(model, [1, 2, 3], GREEDY, 1000))
    assert len(tokens) == 94  # 93 to fill the context, and one more that need not be cached
    assert_greedy(model, [1, 2, 3], tokens)
    stop = tokens[4]
    stopping = SamplingParams(temperature=0, stop_ids=(stop,))
    assert list(generate(model, [1, 2, 3], stopping, 1000)) == tokens[: tokens.index(stop)]
    assert list(generate(model, [1, 2, 3], GREEDY, 3)) == tokens[:3]
    assert list(generate(model, [1, 2, 3], GREEDY, 0)) == []


def test_abandoned_generation_frees_its_slots(backend: str) -> None:
    decoder = Decoder(small_model(), max_slots=2)
    running = generate_many(decoder, [[1, 2]] * 3, [SamplingParams(seed=s) for s in range(3)])
    next(running)
    assert decoder.free_slots == []
    running.close()
    assert decoder.free_slots == [0, 1]


def test_misuse_is_refused(backend: str) -> None:
    decoder = Decoder(small_model(), max_slots=2, max_context=10)
    with pytest.raises(UsageError, match="11 tokens do not fit the context of 10"):
        decoder.prefill(0, range(11))
    with pytest.raises(UsageError, match="token 301 is not in the vocabulary of 301"):
        decoder.prefill(0, [1, 301])
    with pytest.raises(UsageError, match="logit_bias: token 301"):
        decoder.activate(0, SamplingParams(logit_bias={301: 1.0}), [1])
    with pytest.raises(UsageError, match="prompt is empty"):
        decoder.activate(0, SamplingParams(), [])
    with pytest.raises(GptDistError, match="slot 0 has 0 tokens"):
        decoder.prefill(0, [1], 3)
    with pytest.raises(GptDistError, match="slot 2"):
        decoder.prefill(2, [1])
    with pytest.raises(GptDistError, match="cached, not the prompt's 5"):
        decoder.activate(0, SamplingParams(), [1, 2, 3, 4, 5])
    assert decoder.free_slots == [0, 1]
    start(decoder, 0, list(range(10)), GREEDY)
    with pytest.raises(GptDistError, match="active"):
        decoder.prefill(0, [1])
    with pytest.raises(GptDistError, match="active"):
        decoder.copy_prefix(1, 0, 0)
    with pytest.raises(GptDistError, match="slot 1 has 0 tokens"):
        decoder.copy_prefix(1, 1, 4)
    assert decoder.room(0) == 1
    decoder.step()
    with pytest.raises(GptDistError, match="slot 0 is full"):
        decoder.step()
    with pytest.raises(UsageError, match="max_context = 97"):
        Decoder(small_model(), max_slots=1, max_context=97)


def test_a_step_without_slots_is_empty(backend: str) -> None:
    assert Decoder(small_model(), max_slots=1).step().slots == []


@pytest.mark.slow(2)
@ARCHITECTURES
def test_a_step_never_waits_for_the_device(shape: str) -> None:
    """CUDA can record it only if nothing depends on values; fake tensors have none."""
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 64}
    with FakeTensorMode(), torch.no_grad():
        model = GPT(ModelConfig(**{**sizes, **SHAPES[shape]}, vocab_size=99))
        backend = TorchBackend(model, 5, 64, torch.device("cpu"), "bf16", False)
        every = SamplingParams(
            temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.2,
            presence_penalty=0.1, logit_bias={3: 1.0}, min_new_tokens=2, stop_ids=(1,), logprobs=3,
        )  # fmt: skip
        backend.set(0, every, [1, 2, 3])
        plan = backend.sampler.plan([0])
        outputs = backend._step(backend.load(model), 4, 64, plan)
    assert [tuple(output.shape) for output in outputs] == [(4,), (4, 5), (4, 4)]


@ARCHITECTURES
def test_threads_do_not_matter(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend("kernels", monkeypatch)
    model, outcomes = small_model(**SHAPES[shape]), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            decoder = Decoder(model, max_slots=2, dtype="bf16")
            for slot in range(2):
                start(decoder, slot, list(range(40 + slot)), SamplingParams(seed=1, logprobs=9))
            outcomes.append([decoder.step() for _ in range(20)])
    finally:
        torch.set_num_threads(before)
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize(
    ("name", "native", "dtype"),
    [("kernels", False, "bf16"), ("torch", False, "fp32"), ("torch", True, "bf16")],
)
def test_auto_is_bf16_where_that_is_faster(
    name: str, native: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``native``: the CPU has instructions for bf16, which PyTorch uses."""
    use_backend(name, monkeypatch)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    assert Decoder(small_model(), max_slots=1).dtype == dtype


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_without_a_compiler_the_decoder_says_so_and_runs(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    use_backend("kernels", monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if compiler == "broken":
        break_compiler(tmp_path)
    monkeypatch.setattr(kernels, "_library", cache(kernels._library.__wrapped__))
    model = small_model()
    assert_greedy(model, [1], list(generate(model, [1], GREEDY, 5)))
    list(generate(model, [1], GREEDY, 5))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert ("out of order" if compiler == "broken" else "no C++ compiler") in caplog.text
    assert not list(tmp_path.glob("cache/**/*.so"))


@ARCHITECTURES
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_short_prompts_go_through_the_model_together(
    shape: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as fit, in order, and with the result of one by one."""
    use_backend("kernels", monkeypatch)
    model = small_model(**SHAPES[shape])
    together, alone = (Decoder(model, max_slots=9, dtype=dtype) for _ in range(2))  # type: ignore[arg-type]
    calls = []
    forward = CpuBackend._forward

    def counted(self: CpuBackend, weights: Any, count: int, *rest: Any, **options: Any) -> None:
        if self is together._backend:
            calls.append(count)
        forward(self, weights, count, *rest, **options)

    monkeypatch.setattr(CpuBackend, "_forward", counted)
    dice = random.Random(0)
    prompts = [[dice.randrange(301) for _ in range(length)] for length in (1, 30, 50, 47, 3, 90, 2)]
    for slot, ids in enumerate(prompts):
        for decoder in (together, alone):
            decoder.prefill(slot, ids[:-1])
            decoder.activate(slot, SamplingParams(seed=slot), ids)
        alone.flush()
    # A slot that is used again while its prompt waits for others, and a copy of one that waits.
    for decoder in (together, alone):
        decoder.prefill(7, [1, 2, 3])
        decoder.free(7)
        decoder.prefill(7, prompts[1][:-1])
        decoder.copy_prefix(7, 8, 20)
        decoder.activate(8, SamplingParams(seed=8), prompts[1][:21])
    results = [[decoder.step() for _ in range(4)] for decoder in (together, alone)]
    assert results[0] == results[1]
    assert calls[:4] == [128, 87, 33, 8]


def test_prompts_whose_computation_failed_are_not_taken_for_cached() -> None:
    decoder, backend = fake_decoder(2, 64)
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    for slot, ids in enumerate(prompts):
        decoder.prefill(slot, ids[:-1])
        decoder.activate(slot, GREEDY, ids)
    with mock.patch.object(backend, "prefill", side_effect=MemoryError):
        for _ in range(2):
            with pytest.raises(MemoryError):
                decoder.step()
    found = [decoder.step().tokens for _ in range(5)]
    assert list(zip(*found, strict=True)) == [tuple(expected(ids, 0, 1, 5)) for ids in prompts]
