"""The scheduler driven by hand: a clock that the test sets and a decoder that computes nothing."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import pytest

from gpt_dist.inference.results import Chunk, StepResult
from gpt_dist.inference.sampling import SamplingParams
from serve.engine.jobs import (
    Displaced,
    Ended,
    Event,
    Expired,
    Finish,
    Job,
    Scored,
    Scoring,
    Sequence,
    Started,
    Token,
)
from serve.engine.prefill import COPIES
from serve.engine.refusals import QueueFull, TooLate
from serve.engine.scheduler import Scheduler
from tests.fake_decoder import (
    VOCABULARY,
    FakeBackend,
    chosen,
    expected,
    fake_decoder,
    fake_model,
)
from tests.serve.soak import note

COUNT = 10_000 if os.environ.get("SOAK") else 1000
LONG = COUNT > 1000
"""The random jobs after the first thousand reuse less: 188 of 10,000 at chunks of 5."""
CONTEXT = 120


def ignore(event: Event) -> None:
    raise AssertionError("the engine delivers events, not the scheduler")


def sequence(ids: list[int], seed: int = 0, **options: object) -> Sequence:
    stop_ids = options.pop("stop_ids", ())
    sampling = SamplingParams(seed=seed, stop_ids=stop_ids)  # type: ignore[arg-type]
    return Sequence(np.array(ids), ignore, sampling=sampling, **options)  # type: ignore[arg-type]


def counting(length: int, start: int = 0) -> list[int]:
    return [token % VOCABULARY for token in range(start, start + length)]


def test_tick_by_tick() -> None:
    now = [0.0]
    decoder, backend = fake_decoder(2, CONTEXT)
    scheduler = Scheduler(
        decoder, prefill_chunk=16, weights_version="v1", clock=lambda: now[0], max_queue=5
    )
    assert scheduler.tick() == []
    first, second = sequence([7], max_new_tokens=3), sequence(counting(41), max_new_tokens=1)
    text = Scoring(np.array(counting(20)), ignore)
    last = sequence(counting(41), seed=1, max_new_tokens=1)
    scheduler.submit([first, second])
    scheduler.submit([text])
    scheduler.submit([last])
    one, two, three = expected([7], 0, 1, 3)

    now[0] = 1.0
    assert scheduler.tick() == [
        (first, Started(1.0, 0, "v1")),
        (second, Started(1.0, 0, "v1")),
        (first, Token(1.0, one, None, [])),
    ]
    assert (backend.computed, backend.steps, scheduler.jobs.waiting) == (15, 1, 2)
    now[0] = 2.0
    assert scheduler.tick() == [(first, Token(2.0, two, None, []))]
    assert backend.computed == 31
    now[0] = 3.0
    [token] = expected(counting(41), 0, 1, 1)
    assert scheduler.tick() == [  # both run in this step, and both end
        (first, Token(3.0, three, None, [])),
        (first, Ended(3.0, Finish.LENGTH)),
        (second, Token(3.0, token, None, [])),
        (second, Ended(3.0, Finish.LENGTH)),
    ]
    assert (backend.computed, backend.steps, len(scheduler.jobs)) == (40, 3, 2)
    now[0] = 4.0
    assert scheduler.tick() == []  # 16 of the text's 19 tokens
    now[0] = 5.0
    (done, scored), (_, started), (_, answer), (_, ended) = scheduler.tick()
    assert (done, started, ended) == (
        text,
        Started(5.0, 40, "v1"),  # in the slot of `second`
        Ended(5.0, Finish.LENGTH),
    )
    assert isinstance(scored, Scored)
    assert [part.start for part in scored.parts] == [1, 17]
    assert isinstance(answer, Token)
    assert answer.token == expected(counting(41), 1, 1, 1)[0]
    assert (backend.computed, backend.copied, backend.steps) == (59, 0, 4)
    assert not scheduler.busy

    scheduler.submit([late := sequence([1], max_new_tokens=99, deadline=9.0)])
    scheduler.tick()
    now[0] = 9.0
    assert scheduler.tick() == [(late, Expired())]
    assert decoder.free_slots == [0, 1]


def test_the_version_is_that_of_the_weights_that_compute() -> None:
    """New weights arrive between `Started` and the first chunk of the prompt."""
    decoder, backend = fake_decoder(2, 300, deterministic=True)
    scheduler = Scheduler(decoder, prefill_chunk=128, weights_version="old")
    first, second = sequence(counting(60)), sequence(counting(200, 9), max_new_tokens=5)
    scheduler.submit([first, second])
    events = scheduler.tick()
    assert [event for job, event in events if job is second]
    assert (backend.computed, second.done) == (59, 0)  # no whole chunk was left for the second
    scheduler.weights.swap(decoder.load_weights(fake_model(300)), "new")
    while second.generated < 5:
        events += scheduler.tick()
    [started] = [event for _, event in events if isinstance(event, Started) and _ is second]
    tokens = [event.token for job, event in events if job is second and isinstance(event, Token)]
    weights = {"old": 1, "new": 2}[started.weights_version]
    assert tokens == expected(counting(200, 9), 0, weights, 5)


@pytest.mark.parametrize("dense", [False, True])
def test_no_tick_exceeds_a_chunk_and_a_step(dense: bool) -> None:
    """64 slots, and several requests for many outputs: copies are counted too."""
    decoder, backend = fake_decoder(64, 1024, dense)
    scheduler = Scheduler(decoder, prefill_chunk=256, max_queue=500)
    for start in range(4):
        prompt = counting(1000, start)
        for round_ in range(2):
            scheduler.submit(
                [sequence(prompt, seed, max_new_tokens=9 + round_) for seed in range(40)]
            )
    ticks = 0
    while scheduler.busy:
        computed, copied, steps = backend.computed, backend.copied, backend.steps
        scheduler.tick()
        work = backend.computed - computed + (backend.copied - copied) / COPIES
        assert work <= 256
        assert backend.steps - steps <= 1
        ticks += 1
    assert backend.computed < 4 * 1100  # each prompt once
    assert backend.copied > 100 * 1000
    assert ticks < 500


def test_guesses_at_repeated_tokens_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that ends the repetition after a preemption, and goes on with accepted guesses."""
    decoder, _ = fake_decoder(1, CONTEXT)
    scheduler = Scheduler(decoder, prefill_chunk=16, weights_version="v1")
    job = sequence([7], max_new_tokens=50)
    scheduler.submit([job])
    scheduler.tick()
    job.repeated = 2
    step = StepResult(
        slots=[0] * 4, tokens=[1, 2, 3, 4], logprobs=[None] * 4, top=[[]] * 4,
        last=[False, False, False, True], drafted={0: 3},
    )  # fmt: skip
    monkeypatch.setattr(decoder, "step", lambda: step)
    tokens = [event.token for _, event in scheduler.tick() if isinstance(event, Token)]
    assert tokens == [3, 4]
    assert (job.drafted, job.accepted) == (1, 1)


class Traffic:
    """Random submissions, cancellations and swaps, and a record of what came out."""

    def __init__(self, dense: bool, deterministic: bool, chunk: int, speculate: bool) -> None:
        self.dice = random.Random(0)
        self.context = 300 if deterministic else CONTEXT
        self.decoder, self.backend = fake_decoder(6, self.context, dense, deterministic, speculate)
        self.now = 0.0
        self.scheduler = Scheduler(
            self.decoder, prefill_chunk=chunk, weights_version="1", clock=lambda: self.now,
            max_queue=30,
        )  # fmt: skip
        self.events: dict[Job, list[Event]] = {}
        self.oldest: dict[Job, int] = {}
        """The weights that were the newest when the job was submitted."""
        self.stems = [
            [self.dice.randrange(VOCABULARY) for _ in range(self.dice.randint(1, self.context - 9))]
            for _ in range(12)
        ]

    def prompt(self) -> list[int]:
        """New, an old one with another end, or the next turn of an earlier sequence."""
        stem = self.dice.choice(self.stems)
        if self.events and self.dice.random() < 0.4:
            job = self.dice.choice(list(self.events)[-20:])
            stem = [*job.ids.tolist(), *self.tokens(job)]
        kept = self.dice.choice((len(stem), self.dice.randint(0, len(stem))))
        tail = [self.dice.randrange(VOCABULARY) for _ in range(self.dice.randint(1, 8))]
        return [*stem[:kept], *tail][-self.context :]

    def tokens(self, job: Job) -> list[int]:
        return [event.token for event in self.events[job] if isinstance(event, Token)]

    def submit(self) -> None:
        dice, ids = self.dice, self.prompt()
        caller, soon = dice.choice(("", "one", "other")), dice.random() < 0.05
        if dice.random() < 0.1:
            jobs: list[Sequence] | list[Scoring] = [Scoring(np.array(ids), ignore)]
        else:
            jobs = [
                sequence(
                    ids, dice.randrange(1 << 40), max_new_tokens=dice.randint(1, 30),
                    stop_ids=dice.choice(((), (3, 17))), eos_id=3,
                    caller=caller, priority=dice.choice((0, 0, 5)),
                    deadline=self.now + 20 if soon else None,
                    expires_at=self.now + 20 if dice.random() < 0.05 else None,
                )
                for _ in range(dice.choice((1, 1, 1, 4)))
            ]  # fmt: skip
        try:
            self.scheduler.submit(jobs)
        except QueueFull:
            assert len(self.scheduler.jobs) + len(jobs) > self.scheduler.jobs.capacity
        except TooLate:
            assert soon
        else:
            self.events.update({job: [] for job in jobs})
            self.oldest.update(dict.fromkeys(jobs, int(self.scheduler.weights.newest)))

    def tick(self) -> None:
        self.now += 1
        computed, copied, steps = (
            self.backend.computed, self.backend.copied, self.backend.steps
        )  # fmt: skip
        for job, event in self.scheduler.tick():
            assert not job.cancelled
            self.events[job].append(event)
        work = self.backend.computed - computed + (self.backend.copied - copied) / COPIES
        assert work <= self.scheduler.prefill.chunk
        assert self.backend.steps - steps <= 2  # one for each set of weights in use

    def run(self, count: int) -> None:
        while len(self.events) < count:
            for _ in range(self.dice.choice((0, 0, 1, 3))):
                self.submit()
            if self.events and self.dice.random() < 0.2:
                jobs = list(self.events)[-15:]
                self.scheduler.cancel([self.dice.choice(jobs)])  # type: ignore[list-item]
            if self.dice.random() < 0.02 and len(self.in_use()) == 1:
                weights = self.decoder.load_weights(fake_model(self.context))
                self.scheduler.weights.swap(weights, str(weights.version))
            self.tick()
        while self.scheduler.busy:
            self.tick()

    def in_use(self) -> set[int]:
        """Versions of the weights of the sequences at work, and of the newest."""
        slots = set(range(self.decoder.max_slots)) - set(self.decoder.free_slots)
        versions = {self.decoder.version(slot) for slot in slots} | {self.decoder.weights.version}
        waiting = [job for job in self.scheduler.jobs.all() if isinstance(job, Sequence)]
        return versions | {job.weights.version for job in waiting if job.weights}


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("dense", "deterministic", "chunk", "speculate"),
    [
        (False, False, 32, False),
        (True, False, 32, False),
        (False, False, 5, True),
        (False, True, 128, True),
        (True, True, 128, False),
    ],
)
def test_random_sequences_get_the_stream_of_an_undisturbed_server(
    dense: bool, deterministic: bool, chunk: int, speculate: bool
) -> None:
    traffic = Traffic(dense, deterministic, chunk, speculate)
    began = time.monotonic()
    traffic.run(COUNT)
    assert traffic.decoder.free_slots == list(range(6))
    assert len(traffic.scheduler.jobs) == traffic.scheduler.jobs.waiting == 0
    reused = ended = accepted = 0
    for job, events in traffic.events.items():
        if isinstance(job, Scoring):
            check_scores(job, events)
            continue
        assert isinstance(job, Sequence)
        started = [event for event in events if isinstance(event, Started)]
        if not started:
            assert all(isinstance(event, Expired | Ended | Displaced) for event in events)
            continue
        tokens = traffic.tokens(job)
        assert job.accepted <= min(job.drafted, len(tokens))
        accepted += job.accepted
        ids, weights = job.ids.tolist(), int(started[0].weights_version)
        assert weights >= traffic.oldest[job]
        match events[-1]:
            case Ended(_, Finish.LENGTH):
                assert len(tokens) == job.max_new_tokens
            case Ended(_, Finish.CONTEXT_FULL):
                assert len(ids) + len(tokens) == traffic.context + 1
            case Ended(_, Finish.EOS | Finish.STOP_TOKEN as reason, stop):
                assert stop == (3 if reason == Finish.EOS else 17)
                tokens.append(stop)
            case other:
                assert job.cancelled or isinstance(other, Expired | Ended)
        assert tokens == expected(ids, job.sampling.seed, weights, len(tokens))
        reused += started[0].cached_tokens > 0
        ended += isinstance(events[-1], Ended)
    assert ended > COUNT / (4 if LONG else 3)
    assert (accepted > COUNT / 10) == speculate
    assert reused > COUNT / (100 if LONG else 50)  # within a caller
    assert traffic.decoder.weights.version > 3
    assert chunk == 5 or traffic.scheduler.slots.preempted > COUNT / 50  # else prompts hold it up
    assert traffic.scheduler.weights.live == 1
    note(
        f"scheduler: {'dense' if dense else 'sparse'} steps, chunks of {chunk}"
        f"{', deterministic' * deterministic}{', speculating' * speculate}",
        time.monotonic() - began,
        ended={"jobs": len(traffic.events), "from the cache": reused},
        nothing_kept_of=["slots", "queue", "weights"],
    )


def check_scores(job: Scoring, events: list[Event]) -> None:
    """The likeliest token at each place is the one that a greedy sequence would get there."""
    for event in events:
        if not isinstance(event, Scored):
            assert isinstance(event, Expired | Displaced)
            continue
        cached = job.ids + VOCABULARY * int(event.weights_version)
        found = np.concatenate([part.logprobs for part in event.parts] or [np.zeros(0)])
        assert len(found) == len(job.ids) - 1
        for place in range(1, len(job.ids)):
            likely = found[place - 1] > -3
            assert likely == (chosen(cached[:place], 0) == job.ids[place])


def test_work_is_counted() -> None:
    """The counters that the other tests rely on count."""
    backend = FakeBackend(2, 9, dense=True)
    backend.prefill(1, [Chunk(0, np.arange(5), 0)])
    backend.copy(0, 1, 3)
    assert (backend.computed, backend.copied) == (5, 3)
