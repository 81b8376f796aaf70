"""A hog, which queues 1,000 calls, and nine light callers. Time is counted in ticks."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from serve.engine.callers import Terms
from serve.engine.estimates import CAUTION
from serve.engine.jobs import Job, Lost, Scoring, Sequence, Started, Token
from serve.engine.refusals import TooLate
from serve.engine.scheduler import Scheduler
from tests.fake_decoder import VOCABULARY, expected, fake_decoder
from tests.serve.conftest import tiny_model
from tests.serve.engine.test_ticks import ignore

SLOTS, LIGHT = 16, [f"light {number}" for number in range(9)]


def job(caller: str, length: int = 5, **options: object) -> Sequence:
    ids = (np.arange(length) * 7 + 3) % VOCABULARY
    return Sequence(ids, ignore, caller=caller, **options)  # type: ignore[arg-type]


class Load:
    """The hog queues all its calls at once; each light caller makes one at a time.

    Args:
        hog: calls of the hog.
        light: the other callers.
        shared: whether all are one caller to the scheduler, which then has first-come order.
        pause: ticks from a light call's end to the next.
    """

    def __init__(
        self, hog: int = 1000, light: list[str] = LIGHT, shared: bool = False, pause: int = 1
    ) -> None:
        self.decoder, self.backend = fake_decoder(SLOTS, 128)
        self.scheduler = Scheduler(self.decoder, max_queue=2000)
        self.light, self.terms, self.pause = light, Terms("all" if shared else ""), pause
        self.names: dict[Job, str] = {}
        self.since: dict[Job, int] = {}
        self.waited: defaultdict[str, list[int]] = defaultdict(list)
        self.tokens: Counter[str] = Counter()
        self.sent: defaultdict[Job, list[int]] = defaultdict(list)
        self.ready = dict.fromkeys(light, 0)
        self.now = 0
        for number in range(hog):
            self.submit("hog", job("hog", 20, max_new_tokens=20 + number % 40, terms=self.terms))

    def submit(self, name: str, made: Sequence) -> None:
        made.sampling = SamplingParams(seed=len(self.names))
        self.names[made], self.since[made] = name, self.now
        self.scheduler.submit([made])

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            busy = {self.names[each] for each in self.scheduler.jobs.all()}
            for number, name in enumerate(self.light):
                if name in busy:
                    self.ready[name] = self.now + self.pause
                elif self.now >= self.ready[name]:
                    self.submit(name, job(name, 3 + number, max_new_tokens=10, terms=self.terms))
            self.now += 1
            for each, event in self.scheduler.tick():
                name = self.names[each]
                if isinstance(event, Token):
                    if not self.sent[each]:
                        self.waited[name].append(self.now - self.since[each])
                    self.sent[each].append(event.token)
                    self.tokens[name] += 1


def jain(shares: list[float]) -> float:
    """Jain's index of fairness: 1 if all are equal."""
    values = np.array(shares)
    return float(values.sum() ** 2 / (len(values) * (values**2).sum()))


@pytest.mark.slow(5)
@pytest.mark.parametrize("pause", [2, 7])
def test_light_callers_hardly_notice_a_hog(pause: int) -> None:
    ticks = 250
    alone = {name: Load(0, [name], pause=pause) for name in LIGHT}
    for load in alone.values():
        load.run(ticks)
    mixed, in_order = Load(pause=pause), Load(pause=pause, shared=True)
    mixed.run(ticks)
    in_order.run(ticks)
    for name in LIGHT:
        assert max(mixed.waited[name]) <= max(alone[name].waited[name]) + 5
    assert all(not in_order.waited[name] for name in LIGHT)  # so it was without fairness

    # Light callers get all that they ask for, the hog what is left: shares of the max-min
    # allocation (Jain, Chiu and Hawe 1984).
    asked = {name: load.tokens[name] for name, load in alone.items()}
    rest = SLOTS * ticks - sum(asked.values())
    shares = [mixed.tokens[name] / asked[name] for name in LIGHT]
    assert jain([*shares, mixed.tokens["hog"] / rest]) >= 0.95

    total = sum(mixed.tokens.values())
    assert total >= 0.99 * sum(in_order.tokens.values())
    assert mixed.scheduler.slots.preempted > 20
    for made, tokens in mixed.sent.items():  # streams have no gap, no repetition, no other token
        assert tokens == expected(made.ids.tolist(), made.sampling.seed, 1, len(tokens))


@pytest.mark.parametrize("slots", [4, SLOTS])
def test_callers_with_much_work_get_equal_shares(slots: int) -> None:
    decoder, _ = fake_decoder(slots, 128)
    scheduler = Scheduler(decoder, max_queue=3000)
    scheduler.submit([job("hog", 20, max_new_tokens=30) for _ in range(1000)])
    served: Counter[str] = Counter()
    for tick in range(500):
        if tick == 20:
            for name in LIGHT:
                scheduler.submit([job(name, 5, max_new_tokens=10) for _ in range(100)])
        for each, event in scheduler.tick():
            if tick >= 50 and isinstance(event, Token | Started):
                served[each.caller] += 1 if isinstance(event, Token) else len(each.ids) - 1
    assert jain([served[name] for name in ("hog", *LIGHT)]) >= 0.95, served


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
def test_a_real_model_goes_on_with_the_same_tokens(
    deterministic: bool, repetition_penalty: float
) -> None:
    model: GPT = tiny_model()
    sampling = SamplingParams(
        seed=5, repetition_penalty=repetition_penalty, frequency_penalty=0.5, top_k=40,
        min_new_tokens=30, stop_ids=tuple(range(100)),
    )  # fmt: skip
    streams = []
    for disturbed in (False, True):
        decoder = Decoder(model, max_slots=2, dtype="fp32", deterministic=deterministic)
        scheduler = Scheduler(decoder)
        hog = [
            job("hog", 9, max_new_tokens=40, sampling=replace(sampling, seed=seed))
            for seed in (5, 6)
        ]
        scheduler.submit(hog)
        tokens: defaultdict[Job, list[int]] = defaultdict(list)
        for tick in range(150):
            if disturbed and tick in (5, 20):
                scheduler.submit([job("light", 4, max_new_tokens=4)])
            for each, event in scheduler.tick():
                if isinstance(event, Token):
                    tokens[each].append(event.token)
        assert scheduler.slots.preempted == 2 * disturbed
        streams.append([tokens[each] for each in hog])
    assert streams[0] == streams[1]
    assert min(map(len, streams[0])) >= 30


def test_what_waits_again_had_begun() -> None:
    """A sequence that has lost its slot may be what breaks the engine all the same."""
    decoder, _ = fake_decoder(1, 64)
    scheduler = Scheduler(decoder)
    first, light = job("hog", max_new_tokens=30), job("light", max_new_tokens=30)
    scheduler.submit([first])
    scheduler.tick()
    scheduler.submit([light])
    scheduler.tick()
    assert scheduler.slots.preempted == 0  # a caller with one slot keeps it
    decoder, _ = fake_decoder(2, 64)
    scheduler = Scheduler(decoder)
    hog = [job("hog", max_new_tokens=30) for _ in range(2)]
    scheduler.submit(hog)
    scheduler.tick()
    scheduler.submit([light := job("light", max_new_tokens=30)])
    scheduler.tick()
    assert (scheduler.slots.preempted, light.slot >= 0) == (1, True)
    ends = scheduler.abandon("broken")
    assert {each for each, event in ends if isinstance(event, Lost) and event.began} == {
        *hog,
        light,
    }


def test_what_cannot_end_in_time_is_refused_at_once() -> None:
    now = [0.0]
    decoder, _ = fake_decoder(1, 64)
    scheduler = Scheduler(decoder, clock=lambda: now[0])
    real = decoder.step

    def step() -> object:
        now[0] += 1.0
        return real()

    decoder.step = step  # type: ignore[method-assign, assignment]
    scheduler.submit([job("one", max_new_tokens=3, deadline=0.5)])  # nothing is known yet
    while scheduler.busy:
        scheduler.tick()
    for _ in range(3):
        scheduler.submit([job("one", max_new_tokens=10)])
    while scheduler.busy:
        scheduler.tick()
    step_seconds = scheduler.estimates.step
    assert step_seconds == pytest.approx(1.0)
    sure: dict[str, int] = {"max_new_tokens": 20, "least_new_tokens": 20}
    with pytest.raises(TooLate):
        scheduler.submit([job("one", deadline=now[0] + 20 * CAUTION - 1, **sure)])
    scheduler.submit([job("one", deadline=now[0] + 20 * CAUTION + 1, **sure)])
    scheduler.submit([job("one", max_new_tokens=20, deadline=now[0] + 9)])  # it may end early
    budget = now[0] + 2
    scheduler.submit([job("one", deadline=now[0] + 5, expires_at=budget, **sure)])
    for _ in range(6):
        scheduler.submit([job("one", max_new_tokens=10)])
    with pytest.raises(TooLate):  # others of this caller come first
        scheduler.submit([job("one", deadline=now[0] + 2, priority=9)])
    scheduler.submit([job("other", deadline=now[0] + 15)])
    with pytest.raises(TooLate):
        scheduler.submit([Scoring(np.arange(5), ignore, now[0] + 1, "one", priority=9)])
