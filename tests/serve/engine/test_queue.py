"""Whose turn it is: callers share the slots by the tokens that they were served."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from serve.engine.jobs import Job, QueueFull, Sequence, Started, Token
from serve.engine.queue import ACCOUNTS, Queue
from serve.engine.scheduler import Scheduler
from tests.fake_decoder import VOCABULARY, fake_decoder
from tests.serve.engine.test_ticks import ignore


def job(caller: str, length: int = 5, **options: int) -> Sequence:
    ids = np.arange(length) % VOCABULARY
    return Sequence(ids, ignore, caller=caller, **options)  # type: ignore[arg-type]


def take(queue: Queue, tokens: int) -> str:
    """Give the next job a slot, charge it, and let it end; returns its caller."""
    chosen = queue.next()
    assert chosen is not None
    chosen.slot = 0
    queue.charge(chosen, tokens)
    queue.remove(chosen)
    return chosen.caller


def test_the_caller_that_was_served_least_comes_next() -> None:
    queue = Queue(100, lambda: 0.0)
    hog = [job("hog") for _ in range(20)]
    queue.add(hog)
    assert take(queue, 50) == "hog"
    queue.add([job("light") for _ in range(5)])
    # "light" begins where "hog" stood when it was its turn.
    assert [take(queue, 10) for _ in range(8)] == [*5 * ["light"], *3 * ["hog"]]
    assert [each for each in queue.all() if isinstance(each, Sequence)] == hog[4:]


def test_one_caller_is_served_in_order_of_arrival() -> None:
    queue = Queue(10, lambda: 0.0)
    jobs = [job("one") for _ in range(4)]
    queue.add(jobs)
    for expected in jobs:
        assert queue.next() is expected
        assert queue.next() is expected  # nothing has changed
        take(queue, 7)
    assert queue.next() is None


def test_a_pause_saves_nothing_up() -> None:
    queue = Queue(100, lambda: 0.0)
    queue.add([job("early")])
    take(queue, 1)
    queue.add([job("steady") for _ in range(50)])
    for _ in range(20):
        take(queue, 10)
    queue.add([job("early") for _ in range(10)])
    order = [take(queue, 10) for _ in range(10)]
    assert 4 <= order.count("early") <= 6


def test_debts_are_not_forgotten_by_leaving() -> None:
    queue = Queue(100, lambda: 0.0)
    queue.add([job("hog")])
    queue.add([job("light") for _ in range(9)])
    assert take(queue, 50) == "hog"
    queue.add([job("hog")])  # back at once
    assert [take(queue, 10) for _ in range(5)] == 5 * ["light"]


def test_accounts_are_bounded() -> None:
    queue = Queue(5, lambda: 0.0)
    for number in range(2 * ACCOUNTS):
        queue.add([job(f"caller {number}")])
        take(queue, 1)
    assert len(queue._served) <= ACCOUNTS + 1
    queue.add([job("x") for _ in range(5)])
    with pytest.raises(QueueFull):
        queue.add([job("y")])


def test_light_callers_do_not_wait_for_a_hogs_queue() -> None:
    """One caller queues 1,000 calls, nine others make one at a time, through the scheduler."""
    decoder, _ = fake_decoder(8, 64)
    scheduler = Scheduler(decoder, max_queue=2000)
    scheduler.submit([job("hog", max_new_tokens=10) for _ in range(1000)])
    served: Counter[str] = Counter()
    waited: list[int] = []
    since: dict[Job, int] = {}
    for tick in range(400):
        busy = {each.caller for each in scheduler.jobs.all()}
        for number in range(9):
            if f"light {number}" not in busy:
                light = job(f"light {number}", 3 + number, max_new_tokens=10)
                since[light] = tick
                scheduler.submit([light])
        for each, event in scheduler.tick():
            if isinstance(event, Started) and each in since:
                waited.append(tick - since[each])
            if isinstance(event, Token) and tick > 50:
                served[each.caller] += 1
    assert max(waited) <= 20  # two generations of 10 tokens in 8 slots for 10 callers
    tokens = np.array([served["hog"], *(served[f"light {number}"] for number in range(9))], float)
    jain = tokens.sum() ** 2 / (len(tokens) * (tokens**2).sum())
    assert jain >= 0.95, tokens
