"""What fails with one request, and what fails with the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.sampling import SamplingParams
from serve.engine.jobs import Ended, Expired, Failed, Lost, Scored, Scoring
from serve.engine.scheduler import Scheduler
from tests.serve.engine.test_scheduler import Ear, at_rest, run, sequence, tick

BAD = 66
"""A token that the decoders here choke on."""
POISON = [BAD] * 40
MakeDecoder = Callable[..., Decoder]


class Choking:
    """A decoder of which one method fails for prompts that hold the token `BAD`."""

    def __init__(self, decoder: Decoder, method: str, error: Exception) -> None:
        self.decoder, self.method, self.error = decoder, method, error

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.decoder, name)
        if name != self.method:
            return value

        def choke(*arguments: Any) -> Any:
            answer = value(*arguments)  # half of the harm is done before it fails
            if any(BAD in np.asarray(a) for a in arguments if np.ndim(a) == 1):
                raise self.error
            return answer

        return choke


@pytest.mark.parametrize("method", ["place", "prefill", "activate"])
def test_a_request_that_raises_ends_alone(make_decoder: MakeDecoder, method: str) -> None:
    decoder = Choking(make_decoder(2), method, ValueError("not for me"))
    scheduler = Scheduler(decoder, prefill_chunk=16)  # type: ignore[arg-type]
    before, bad, after = (
        sequence(ids, max_new_tokens=9) for ids in ([1] * 40, POISON, [1] * 20 + [2] * 20)
    )
    scheduler.submit([before, bad, after])
    run(scheduler)
    assert bad.listener.end == Failed()
    for job in (before, after):
        assert isinstance(job.listener.end, Ended)
        assert len(job.listener.tokens) == 9
    assert at_rest(scheduler)


def test_nothing_of_a_failed_prompt_is_reused(make_decoder: MakeDecoder) -> None:
    """The same prompt is computed from its beginning when the fault is gone."""
    decoder = Choking(make_decoder(1), "prefill", ValueError("not for me"))
    scheduler = Scheduler(decoder, prefill_chunk=64)  # type: ignore[arg-type]
    expected = sequence(POISON, max_new_tokens=9)
    healthy = Scheduler(make_decoder(1), prefill_chunk=64)
    healthy.submit([expected])
    run(healthy)
    scheduler.submit([sequence(POISON, max_new_tokens=9)])
    run(scheduler)
    decoder.method = "none"
    again = sequence(POISON, max_new_tokens=9)
    scheduler.submit([again])
    run(scheduler)
    assert again.listener.events[0].cached_tokens == 0
    assert again.listener.tokens == expected.listener.tokens


def test_a_text_that_cannot_be_scored_ends_alone(make_decoder: MakeDecoder) -> None:
    decoder = Choking(make_decoder(1), "score", ValueError("not for me"))
    scheduler = Scheduler(decoder)  # type: ignore[arg-type]
    bad, good = (Scoring(np.array(ids), Ear()) for ids in (POISON, [1, 2, 3]))
    scheduler.submit([bad, good])
    run(scheduler)
    assert bad.listener.events == [Failed()]
    assert isinstance(good.listener.end, Scored)
    assert at_rest(scheduler)


@pytest.mark.parametrize("method", ["admit", "prefill", "step"])
def test_only_what_had_begun_may_be_to_blame(make_decoder: MakeDecoder, method: str) -> None:
    """A RuntimeError is the device's, and ends the engine."""
    made = make_decoder(2)
    scheduler = Scheduler(made, prefill_chunk=16)
    running, bad, waiting = (sequence(ids, max_new_tokens=99) for ids in ([1], POISON, [2]))
    scheduler.submit([running])
    tick(scheduler)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    setattr(made, method, fail)
    scheduler.submit([bad, waiting])
    with pytest.raises(RuntimeError):
        tick(scheduler)
    for job, event in scheduler.abandon("gone"):
        job.listener(event)
    assert running.listener.end == bad.listener.end == Lost("gone", began=True)
    assert waiting.listener.events == [Lost("gone", began=False)]


def test_what_a_failed_tick_had_ended_is_still_told(make_decoder: MakeDecoder) -> None:
    made, now = make_decoder(2), [0.0]
    scheduler = Scheduler(made, clock=lambda: now[0])
    job, late = sequence([1], max_new_tokens=99), sequence([2], max_new_tokens=99, deadline=5)
    scheduler.submit([job, late])
    tick(scheduler)
    tick(scheduler)

    def fail() -> None:
        raise RuntimeError("out of memory")

    made.step, now[0] = fail, 6.0  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError):
        tick(scheduler)
    for ended, event in scheduler.abandon("gone"):
        ended.listener(event)
    assert late.listener.end == Expired()
    assert job.listener.end == Lost("gone", began=True)


def test_parameters_that_the_decoder_refuses(make_decoder: MakeDecoder) -> None:
    """The API checks them before; here nothing does."""
    scheduler = Scheduler(make_decoder(1))
    bad = sequence([1, 2], SamplingParams(stop_ids=(10**6,)), max_new_tokens=3)
    good = sequence([1, 2], max_new_tokens=3)
    scheduler.submit([bad, good])
    run(scheduler)
    assert bad.listener.end == Failed()
    assert len(good.listener.tokens) == 3
