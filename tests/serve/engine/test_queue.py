"""Whose turn it is: callers share the slots by the tokens that they were served."""

from __future__ import annotations

import numpy as np
import pytest

from serve.engine.callers import Terms
from serve.engine.jobs import Job, Sequence
from serve.engine.queue import ACCOUNTS, Queue
from serve.engine.refusals import CallerFull, QueueFull
from tests.fake_decoder import VOCABULARY
from tests.serve.engine.test_ticks import ignore


def job(caller: str, length: int = 5, **options: object) -> Sequence:
    ids = np.arange(length) % VOCABULARY
    return Sequence(ids, ignore, caller=caller, **options)  # type: ignore[arg-type]


def take(queue: Queue, tokens: int) -> str:
    """Give the next job a slot, charge it, and let it end; returns its caller."""
    chosen = queue.next()
    assert chosen is not None
    queue.start(chosen, 0)
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
    queue.add(jobs[:2])
    queue.add(jobs[2:])
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


def test_a_heavier_caller_gets_more() -> None:
    queue = Queue(300, lambda: 0.0)
    queue.add([job("heavy", terms=Terms(weight=3)) for _ in range(100)])
    queue.add([job("plain") for _ in range(100)])
    order = [take(queue, 10) for _ in range(80)]
    assert abs(order.count("heavy") - 60) <= 1


def test_a_full_queue_takes_from_the_caller_that_has_the_most() -> None:
    queue = Queue(10, lambda: 0.0)
    hog = [job("hog") for _ in range(10)]
    queue.add(hog)
    running = queue.next()
    assert running is hog[0]
    queue.start(running, 0)
    queue.add([job("light") for _ in range(3)])
    assert queue.displaced() == [hog[9], hog[8], hog[7]]
    assert len(queue) == 10
    with pytest.raises(QueueFull):
        queue.add([job("hog")])
    with pytest.raises(QueueFull):
        queue.add([job("light") for _ in range(3)])  # it would have more than the other
    assert queue.displaced() == []
    queue.check("light", Terms())
    with pytest.raises(QueueFull):
        queue.check("hog", Terms())


def test_limits_of_a_caller() -> None:
    queue = Queue(100, lambda: 0.0, slots=8)
    terms = Terms(running=2, waiting=3)
    jobs = [job("one", terms=terms) for _ in range(5)]
    queue.add(jobs)
    with pytest.raises(CallerFull, match="waiting"):
        queue.add([job("one", terms=terms)])
    for slot in range(2):
        queue.start(jobs[slot], slot)
    assert queue.next() is None  # the others wait although slots are free
    queue.add([job("other")])
    assert queue.next() is not None
    queue.remove(jobs[0])
    queue.add([job("one", terms=terms)])
    strict = Terms(account="strict", running=1, waiting=0)
    queue.add([job("a token", terms=strict)])
    with pytest.raises(CallerFull, match="running"):
        queue.add([job("another token of it", terms=strict)])


def test_the_order_within_a_caller() -> None:
    now = [0.0]
    queue = Queue(10, lambda: now[0])
    plain, urgent = job("one"), job("one", deadline=20.0)
    first, high = job("one", deadline=9.0), job("one", priority=-2)
    queue.add([plain])
    for each in (urgent, first, high):
        queue.add([each])
    assert order(queue) == [first, urgent, high, plain]
    queue.add([plain := job("one")])
    now[0] = 19.0
    queue.add([early := job("one", priority=-2)])
    now[0] = 21.0
    queue.add([late := job("one", priority=-2)])  # `plain` has aged by two steps
    assert order(queue) == [early, plain, late]


def order(queue: Queue) -> list[Job]:
    """Let all jobs have their turn."""
    jobs = []
    while (chosen := queue.next()) is not None:
        queue.start(chosen, 0)
        queue.remove(chosen)
        jobs.append(chosen)
    return jobs
