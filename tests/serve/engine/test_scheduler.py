"""The scheduler with a real decoder: admission, limits, prefixes, weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import generate
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from serve.engine.jobs import (
    Ended,
    Event,
    Expired,
    Finish,
    Scored,
    Scoring,
    Sequence,
    Started,
    Token,
)
from serve.engine.refusals import QueueFull
from serve.engine.scheduler import Scheduler
from tests.serve.conftest import CONTEXT, VOCABULARY, tiny_model

GREEDY = SamplingParams(temperature=0)
MakeDecoder = Callable[..., Decoder]


class Ear:
    """Collects the events of one job."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def all(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.all(Token)]

    @property
    def end(self) -> Event:
        return self.events[-1]


def sequence(ids: list[int], sampling: SamplingParams = GREEDY, **options: Any) -> Sequence:
    return Sequence(np.array(ids), Ear(), sampling=sampling, **options)


def tick(scheduler: Scheduler) -> None:
    for job, event in scheduler.tick():
        job.listener(event)


def run(scheduler: Scheduler) -> None:
    for _ in range(10_000):
        if not scheduler.busy:
            return
        tick(scheduler)
    raise AssertionError("the scheduler does not come to rest")


def prompts(count: int, longest: int = 100, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(count)
    ]


def at_rest(scheduler: Scheduler) -> bool:
    decoder = scheduler.decoder
    return (
        len(scheduler.jobs) == 0
        and not scheduler.slots.running
        and len(decoder.free_slots) == decoder.max_slots
        and not decoder.active_slots
    )


def test_greedy_tokens_are_the_argmax_of_a_full_forward(
    model: GPT, make_decoder: MakeDecoder
) -> None:
    """50 prompts of mixed length in 8 slots, compared with the model without a cache."""
    scheduler = Scheduler(make_decoder(8), prefill_chunk=24)
    jobs = [sequence(ids, max_new_tokens=20) for ids in prompts(50)]
    scheduler.submit(jobs)
    run(scheduler)
    for job in jobs:
        tokens = job.listener.tokens
        assert len(tokens) == 20
        whole = torch.tensor([[*job.ids.tolist(), *tokens]])
        with torch.no_grad():
            logits = model(whole)[0, len(job.ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < 1e-4
    assert at_rest(scheduler)


def test_events_and_finish_reasons(make_decoder: MakeDecoder) -> None:
    scheduler = Scheduler(make_decoder(), weights_version="v1")
    free = sequence([1, 2, 3], max_new_tokens=12)
    scheduler.submit([free])
    run(scheduler)
    tokens = free.listener.tokens
    started, *_, ended = free.listener.events
    assert isinstance(started, Started)
    assert (started.cached_tokens, started.weights_version) == (0, "v1")
    assert (ended.reason, ended.token) == (Finish.LENGTH, None)

    last = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 2)
    stop = tokens[last]
    for eos, reason in ((stop, Finish.EOS), (None, Finish.STOP_TOKEN)):
        sampling = SamplingParams(temperature=0, stop_ids=(stop,))
        job = sequence([1, 2, 3], sampling, max_new_tokens=12, eos_id=eos)
        scheduler.submit([job])
        run(scheduler)
        assert job.listener.tokens == tokens[:last]
        assert (job.listener.end.reason, job.listener.end.token) == (reason, stop)

    full = sequence([5] * (CONTEXT - 3), max_new_tokens=50)
    scheduler.submit([full])
    run(scheduler)
    assert full.listener.end.reason == Finish.CONTEXT_FULL
    assert len(full.listener.tokens) == 4  # the last token needs no cache entry
    assert at_rest(scheduler)


def test_min_new_tokens_holds_stop_tokens_back(make_decoder: MakeDecoder) -> None:
    everything = tuple(range(VOCABULARY - 1))
    sampling = SamplingParams(temperature=0, stop_ids=everything, min_new_tokens=5)
    scheduler = Scheduler(make_decoder())
    job = sequence([1, 2], sampling, max_new_tokens=9)
    scheduler.submit([job])
    run(scheduler)
    assert job.listener.tokens[:5] == [VOCABULARY - 1] * 5


class Spy:
    """A decoder that counts the prompt tokens computed between two steps."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.prefilled: list[int] = [0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def prefill(self, slot: int, ids: np.ndarray, start: int = 0) -> None:
        self.prefilled[-1] += len(ids)
        self.decoder.prefill(slot, ids, start)

    def score(self, slot: int, ids: np.ndarray, start: int = 0, top: int = 0) -> Any:
        self.prefilled[-1] += len(ids) - 1
        return self.decoder.score(slot, ids, start, top)

    def step(self) -> Any:
        self.prefilled.append(0)
        return self.decoder.step()


def test_long_prompts_stall_running_streams_by_no_more_than_a_chunk(
    make_decoder: MakeDecoder,
) -> None:
    spy = Spy(make_decoder())
    scheduler = Scheduler(spy, prefill_chunk=16)  # type: ignore[arg-type]
    first = sequence([1], max_new_tokens=100)
    scheduler.submit([first])
    tick(scheduler)
    scheduler.submit([sequence(ids, max_new_tokens=3) for ids in prompts(9, 150)])
    scheduler.submit([Scoring(np.array(ids), Ear()) for ids in prompts(3, 150, seed=1)])
    steps = 0
    while first.slot >= 0:
        before = len(first.listener.tokens)
        tick(scheduler)
        assert len(first.listener.tokens) == before + 1
        steps += 1
    assert max(spy.prefilled) == 16
    assert sum(spy.prefilled) > 500
    run(scheduler)
    assert at_rest(scheduler)


@pytest.mark.parametrize("prompt_length", [3, 40, 150])
def test_n_outputs_share_one_prefill(make_decoder: MakeDecoder, prompt_length: int) -> None:
    spy = Spy(make_decoder(4))
    scheduler = Scheduler(spy, prefill_chunk=32)  # type: ignore[arg-type]
    [ids] = prompts(1, prompt_length)
    ids = (ids * prompt_length)[:prompt_length]
    jobs = [
        sequence(ids, SamplingParams(seed=seed), max_new_tokens=CONTEXT - prompt_length)
        for seed in (7, 8, 9, 10)
    ]
    scheduler.submit(jobs)
    run(scheduler)
    once = len(ids) - 1
    assert sum(spy.prefilled) == (once if once >= 16 else 4 * once)
    for job in jobs:
        alone = list(generate(spy.decoder, ids, job.sampling, job.max_new_tokens))
        assert job.listener.tokens == alone
    assert len({tuple(job.listener.tokens) for job in jobs}) == 4


def test_repeated_prompts_are_cached_across_other_traffic(
    make_decoder: MakeDecoder, model: GPT
) -> None:
    """The next turn of a conversation reuses the earlier ones, including the model's answers."""
    spy = Spy(make_decoder(4))
    scheduler = Scheduler(spy)  # type: ignore[arg-type]
    talks = [ids + [1] * (40 - len(ids)) for ids in prompts(3, 40)]
    for turn in range(3):
        for talk in talks:
            job = sequence(talk, max_new_tokens=8)
            spy.prefilled = [0]
            scheduler.submit([job])
            run(scheduler)
            cached = job.listener.all(Started)[0].cached_tokens
            assert cached == (0 if turn == 0 else len(talk) - 5)
            assert sum(spy.prefilled) == len(talk) - 1 - cached
            expected = list(generate(model, talk, GREEDY, 8))
            assert job.listener.tokens == expected
            # The last generated token was never computed.
            talk.extend([*expected, 1, 2, 3, 4])
    assert at_rest(scheduler)


def test_swap_keeps_running_sequences_on_their_weights_and_forgets_prefixes(
    make_decoder: MakeDecoder, model: GPT
) -> None:
    decoder, other = make_decoder(3), tiny_model(seed=1)
    scheduler = Scheduler(decoder, weights_version="old", prefill_chunk=16)
    ids = list(range(60))
    before, during = sequence(ids, max_new_tokens=30), sequence(ids[::-1], max_new_tokens=30)
    scheduler.submit([before])
    for _ in range(8):
        tick(scheduler)
    scheduler.submit([during])
    tick(scheduler)  # its prefill began with the old weights
    scheduler.weights.swap(decoder.load_weights(other), "new")
    assert scheduler.weights.newest == "new"
    after = sequence(ids, max_new_tokens=30)
    scheduler.submit([after])
    run(scheduler)
    for job, version, weights in (
        (before, "old", model),
        (during, "old", model),
        (after, "new", other),
    ):
        [started] = job.listener.all(Started)
        assert started.weights_version == version
        assert job.listener.tokens == list(generate(weights, job.ids.tolist(), GREEDY, 30))
    assert after.listener.all(Started)[0].cached_tokens == 0
    late = sequence(ids, max_new_tokens=30)
    scheduler.submit([late])
    run(scheduler)
    assert late.listener.tokens == after.listener.tokens
    assert late.listener.all(Started)[0].cached_tokens > 0


def test_cancellation_in_every_phase_frees_the_slot_within_one_tick(
    make_decoder: MakeDecoder,
) -> None:
    for ticks in range(14):  # queued, prefilling, first token, mid-stream
        scheduler = Scheduler(make_decoder(1), prefill_chunk=16)
        job = sequence(list(range(100)), max_new_tokens=60)
        scheduler.submit([job])
        for _ in range(ticks):
            tick(scheduler)
        seen = len(job.listener.events)
        scheduler.cancel([job])
        tick(scheduler)
        assert len(job.listener.events) == seen
        assert at_rest(scheduler)
    scheduler.submit([text := Scoring(np.arange(100), Ear())])
    tick(scheduler)
    scheduler.cancel([text])
    tick(scheduler)
    assert at_rest(scheduler)
    assert text.listener.events == []
    scheduler.cancel([job, text])  # a second time, and after the end
    run(scheduler)
    assert at_rest(scheduler)


def test_deadlines_and_time_budgets(make_decoder: MakeDecoder) -> None:
    now = [0.0]
    scheduler = Scheduler(make_decoder(1), clock=lambda: now[0])
    running = sequence([1, 2], max_new_tokens=99, expires_at=10)
    queued = sequence([1, 2], max_new_tokens=99, expires_at=5)
    overdue = sequence([1, 2], max_new_tokens=99, deadline=5)
    late = sequence([1, 2], max_new_tokens=99, deadline=20)
    scheduler.submit([running])
    tick(scheduler)
    for job in (queued, overdue, late):
        scheduler.submit([job])
    for _ in range(3):
        tick(scheduler)
    assert scheduler.jobs.waiting == 3
    now[0] = 5
    tick(scheduler)
    assert (queued.listener.end.reason, queued.listener.tokens) == (Finish.TIME_BUDGET, [])
    assert overdue.listener.events == [Expired()]
    assert len(scheduler.jobs) == 2
    now[0] = 10
    tick(scheduler)
    assert running.listener.end.reason == Finish.TIME_BUDGET
    assert len(running.listener.tokens) == 5
    assert late.listener.tokens  # it has a slot by now
    now[0] = 20
    tick(scheduler)
    assert late.listener.end == Expired()
    assert at_rest(scheduler)


def test_the_bound_is_exact_and_all_or_none(make_decoder: MakeDecoder) -> None:
    scheduler = Scheduler(make_decoder(2), max_queue=3)
    scheduler.submit([sequence([1], max_new_tokens=5) for _ in range(3)])
    with pytest.raises(QueueFull):
        scheduler.submit([sequence([1]) for _ in range(3)])
    assert len(scheduler.jobs) == 3
    scheduler.submit([sequence([1], max_new_tokens=5) for _ in range(2)])
    with pytest.raises(QueueFull):
        scheduler.submit([Scoring(np.array([1, 2]), Ear())])
    run(scheduler)
    assert at_rest(scheduler)


def test_scores_are_those_of_a_full_forward(make_decoder: MakeDecoder, model: GPT) -> None:
    scheduler = Scheduler(make_decoder(2), prefill_chunk=16, weights_version="v")
    noise = [sequence(ids, max_new_tokens=40) for ids in prompts(4)]
    texts = [Scoring(np.array(ids), Ear(), top=3) for ids in [*prompts(6, 150, seed=2), [4]]]
    scheduler.submit(noise)
    scheduler.submit(texts)
    run(scheduler)
    for text in texts:
        [scored] = text.listener.events
        assert isinstance(scored, Scored)
        assert scored.weights_version == "v"
        found = [value for part in scored.parts for value in part.logprobs.tolist()]
        assert len(found) == len(text.ids) - 1
        if not found:
            continue
        with torch.no_grad():
            logprobs = model(torch.tensor(text.ids)[None])[0].double().log_softmax(-1)
        expected = logprobs[:-1].gather(1, torch.tensor(text.ids)[1:, None])[:, 0]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
        best = np.concatenate([part.top_logprobs for part in scored.parts])
        np.testing.assert_allclose(best, logprobs[:-1].topk(3).values.numpy(), atol=1e-4)


def test_random_traffic(make_decoder: MakeDecoder, model: GPT) -> None:
    """Random submissions and cancellations: the others are correct, and nothing is left over."""
    draw = random.Random(3)
    scheduler = Scheduler(make_decoder(4), max_queue=20, prefill_chunk=16)
    stems, jobs = prompts(5, 60, seed=4), []
    while len(jobs) < 150:
        if draw.random() < 0.5:
            ids = draw.choice(stems) + [draw.randrange(VOCABULARY)] * draw.randint(0, 30)
            new = [
                sequence(ids, SamplingParams(seed=draw.randrange(9), top_k=20), max_new_tokens=8)
                for _ in range(draw.choice((1, 1, 3)))
            ]
            try:
                scheduler.submit(new)
                jobs += new
            except QueueFull:
                assert len(scheduler.jobs) > 20
        if jobs and draw.random() < 0.3:
            scheduler.cancel([draw.choice(jobs[-12:])])
        tick(scheduler)
    run(scheduler)
    assert at_rest(scheduler)
    reference = Decoder(model, max_slots=1, dtype="fp32")
    finished = [job for job in jobs if job.listener.all(Ended)]
    assert 30 < len(finished) < len(jobs)
    for job in finished[::3]:
        assert job.listener.tokens == list(generate(reference, job.ids, job.sampling, 8))


def test_deterministic_alone_and_beside_others(make_decoder: MakeDecoder) -> None:
    """Bitwise equal log-probabilities, whatever else runs or is cached."""
    ids = [token % VOCABULARY for token in range(140)]
    sampling = SamplingParams(seed=5, top_p=0.9, logprobs=0)

    def logprobs(company: int, warm: list[int]) -> list[tuple[int, float]]:
        scheduler = Scheduler(make_decoder(32, deterministic=True), prefill_chunk=300)
        scheduler.submit([sequence(warm, max_new_tokens=9)])
        run(scheduler)
        job = sequence(ids, sampling, max_new_tokens=15)
        others = [sequence(p, SamplingParams(seed=1), max_new_tokens=30) for p in prompts(company)]
        scheduler.submit([*others[: company // 2], job, *others[company // 2 :]])
        run(scheduler)
        return [(event.token, event.logprob) for event in job.listener.all(Token)]

    alone = logprobs(0, [1])
    assert len(alone) == 15
    for warm in ([1], ids[:60], ids[:130], [*ids, 4]):
        assert logprobs(31, warm) == alone
