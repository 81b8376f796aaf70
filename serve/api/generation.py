"""A generation request in progress: its sequences in the engine and their text.

Everything here runs in the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.duration_pb2 import Duration

from gpt_dist.v1 import generation_pb2 as pb
from gpt_dist.v1.generation_service_pb2 import (
    GenerateResponse,
    GenerateStreamResponse,
    GenerationFinished,
    GenerationStarted,
)
from serve.api.callers import caller
from serve.api.logprobs import token_logprob
from serve.api.parsing import Generation
from serve.api.rpc import current
from serve.api.served import Served
from serve.api.status import (
    StatusError,
    expired,
    internal,
    lost,
    other_weights,
    overloaded,
)
from serve.api.text import TextAssembler
from serve.engine.jobs import (
    Displaced,
    Ended,
    Event,
    Expired,
    Failed,
    Finish,
    Lost,
    Scored,
    Sequence,
    Started,
    Token,
)
from serve.metrics import Metrics
from serve.phases import Phase


class Output:
    """One continuation, as the caller receives it.

    Events are processed when they arrive, not when the caller reads, so that a slow reader does not
    delay the detection of a stop sequence.
    """

    def __init__(self, index: int, call: Call, wanted: Generation) -> None:
        self.index, self.call, self.tokenizer = index, call, call.served.tokenizer
        self.text = TextAssembler(
            self.tokenizer, wanted.stops, wanted.include_stop, wanted.sampling.min_new_tokens
        )
        self.min_tokens = wanted.sampling.min_new_tokens
        self.started: Started | None = None
        self.first_token_at = self.ended_at = 0.0
        self.tokens = 0
        self.finish: Finish | None = None
        self.stop_token: int | None = None
        self.job: Sequence
        # Not yet taken by the reader:
        self.delta: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[pb.TokenLogprob] = []
        self.announced = self.closed = False

    def __call__(self, event: Event) -> None:
        if self.finish is not None:  # sent before the engine learnt of the stop sequence
            return
        match event:
            case Token():
                self._add(event)
            case Started():
                self.started = event
                expected = self.call.wanted.expected_weights_version
                if expected and event.weights_version != expected:  # swapped since the check
                    self.call.fail(other_weights(expected, event.weights_version))
                self.call.metrics.queue_time.observe(event.at - self.call.arrived)
                return  # reported with the first token
            case Ended():
                self.delta.append(self.text.flush())
                self.stop_token = event.token
                self._end(Finish.STOP_SEQUENCE if self.text.matched else event.reason, event.at)
            case Expired():
                self.call.fail(expired())
            case Lost():
                self.call.fail(lost(event, event.began or self.call.began))
            case Displaced():
                self.call.fail(overloaded(self.call.engine.scheduler.jobs.retry_after))
            case Failed():
                self.call.fail(internal())
            case Scored():
                raise TypeError("a sequence is not scored")
        if self.finish is not None or not self.call.quiet:
            self.call.changed.set()

    def _add(self, event: Token) -> None:
        metrics = self.call.metrics
        if not self.tokens:
            self.first_token_at = event.at
            metrics.time_to_first_token.observe(event.at - self.call.arrived)
        else:
            metrics.inter_token.observe(event.at - self.ended_at)
        self.ended_at = event.at
        self.tokens += 1
        self.token_ids.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(token_logprob(self.tokenizer, event))
        self.delta.append(self.text.push(event.token))
        if self.text.matched is not None:
            self.call.engine.cancel([self.job])
            self._end(Finish.STOP_SEQUENCE, event.at)

    def _end(self, reason: Finish, at: float) -> None:
        self.finish, self.ended_at = reason, at
        metrics, job = self.call.metrics, self.job
        metrics.finished(reason, self.tokens, job.drafted, job.accepted, self.call.caller)

    @property
    def pending(self) -> bool:
        """Whether `take` would return something new."""
        return bool(self.token_ids) or (self.finish is not None and not self.closed)

    def take(self) -> GenerateStreamResponse:
        """Return what has arrived since the last call, as one message."""
        message = GenerateStreamResponse(
            index=self.index,
            text_delta="".join(self.delta),
            token_ids=self.token_ids,
            logprobs=self.logprobs,
        )
        self.delta, self.token_ids, self.logprobs = [], [], []
        if not self.announced:
            self.announced = True
            message.started.CopyFrom(self._started())
        if self.finish is not None:
            self.closed = True
            message.finished.CopyFrom(self._finished())
        return message

    def whole(self) -> pb.GenerationOutput:
        """Return a finished output from which nothing was taken."""
        output = pb.GenerationOutput(
            index=self.index,
            text="".join(self.delta),
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=int(self.finish or 0),  # type: ignore[arg-type]
        )
        self._set_stop(output)
        return output

    def _set_stop(self, message: pb.GenerationOutput | GenerationFinished) -> None:
        if self.finish == Finish.STOP_SEQUENCE:
            message.stop_sequence = self.text.matched or ""
        elif self.stop_token is not None:
            message.stop_token_id = self.stop_token

    def _started(self) -> GenerationStarted:
        return GenerationStarted(
            prompt_tokens=len(self.job.ids),
            cached_tokens=self.cached_tokens,
            seed=self.call.wanted.sampling.seed,
            weights_version=self.weights_version,
            system_fingerprint=self.call.served.fingerprint(self.weights_version),
        )

    def _finished(self) -> GenerationFinished:
        finished = GenerationFinished(
            finish_reason=int(self.finish or 0),  # type: ignore[arg-type]
            usage=self.usage(),
            timings=self.call.timings([self]),
        )
        self._set_stop(finished)
        return finished

    def usage(self) -> pb.Usage:
        """Its numbers of tokens. Output 0 has those of the prompt, so that they can be added up."""
        usage = pb.Usage(
            completion_tokens=self.tokens,
            drafted_tokens=self.job.drafted,
            accepted_tokens=min(self.job.accepted, self.tokens),
        )
        if not self.index:
            usage.prompt_tokens, usage.cached_tokens = len(self.job.ids), self.cached_tokens
        return usage

    def phases(self) -> list[Phase]:
        """Its parts, for traces."""
        now = self.call.engine.clock()
        offset = time.time_ns() - int(now * 1e9)
        times = [
            self.call.arrived,
            self.started.at if self.started else now,
            self.first_token_at or now,
            self.ended_at if self.finish is not None else now,
        ]
        reached = 1 + bool(self.started) + bool(self.first_token_at)
        found: dict[str, dict[str, int]] = {
            "queue": {},
            "prefill": {
                "gpt_dist.prompt_tokens": len(self.job.ids),
                "gpt_dist.cached_tokens": self.cached_tokens,
            },
            "decode": {"gpt_dist.completion_tokens": self.tokens},
        }
        return [
            Phase(
                name,
                offset + int(times[place] * 1e9),
                offset + int(times[place + 1] * 1e9),
                {"gpt_dist.output": self.index, **more},
            )
            for place, (name, more) in enumerate(list(found.items())[:reached])
        ]

    @property
    def cached_tokens(self) -> int:
        return self.started.cached_tokens if self.started else 0

    @property
    def weights_version(self) -> str:
        # A time budget can run out in the queue.
        return self.started.weights_version if self.started else self.call.served.weights_version


class Call:
    """All outputs of one request. Leaving the context cancels what is unfinished.

    Args:
        wanted: the request.
        served: the model.
        metrics: counts tokens and measures times.
        deadline: when the caller gives up, in seconds of the engine's clock.
    """

    def __init__(
        self,
        wanted: Generation,
        served: Served,
        metrics: Metrics,
        deadline: float | None = None,
    ) -> None:
        self.wanted, self.served, self.metrics = wanted, served, metrics
        self.engine = served.engine
        self.arrived = self.engine.clock()
        self.changed = asyncio.Event()
        self.quiet = True
        """Whether only the end of an output wakes the reader; new tokens do not."""
        self.error: StatusError | None = None
        self.outputs = [Output(index, self, wanted) for index in range(wanted.outputs)]
        budget, who = wanted.time_budget, caller.get()
        self.caller = metrics.caller(who.terms.name)
        room = served.limits.max_context - len(wanted.ids) + 1
        for output in self.outputs:
            output.job = Sequence(
                wanted.ids,
                output,
                deadline,
                sampling=wanted.sampling_of(output.index),
                max_new_tokens=wanted.max_new_tokens,
                eos_id=wanted.eos_id,
                expires_at=None if budget is None else self.arrived + budget,
                least_new_tokens=min(wanted.least_new_tokens, room),
                caller=who.id,
                terms=who.terms,
                salt=wanted.salt,
                priority=wanted.priority,
            )

    @property
    def jobs(self) -> list[Sequence]:
        """The sequences in the engine."""
        return [output.job for output in self.outputs]

    @property
    def began(self) -> bool:
        """Whether the computation of any output has begun."""
        return any(output.started is not None for output in self.outputs)

    def __enter__(self) -> Call:
        self.engine.submit(self.jobs)
        self.metrics.prompted(len(self.wanted.ids), self.caller)
        return self

    def __exit__(self, *_: object) -> None:
        left = [output for output in self.outputs if output.finish is None]
        if left:
            self.engine.cancel([output.job for output in left])
            if self.error is None:
                self.metrics.cancelled.inc(len(left))
        record = current.get(None)
        if record is not None and record.phases is not None:
            for output in self.outputs:
                record.phases += output.phases()

    def fail(self, error: StatusError) -> None:
        """Fail the call; the first error counts."""
        self.error = self.error or error
        self.changed.set()

    async def finished(self) -> GenerateResponse:
        """Wait for all outputs and return them.

        Raises:
            StatusError: the deadline passed, or the engine failed.
        """
        await self._until(lambda: all(output.finish is not None for output in self.outputs))
        version = self.outputs[0].weights_version
        return GenerateResponse(
            outputs=[output.whole() for output in self.outputs],
            usage=self.usage(),
            timings=self.timings(self.outputs),
            seed=self.wanted.sampling.seed,
            weights_version=version,
            system_fingerprint=self.served.fingerprint(version),
        )

    async def messages(self, interval: float = 0.0) -> AsyncIterator[GenerateStreamResponse]:
        """Yield text as it arrives. Text that arrived while the reader was busy is one message.

        Args:
            interval: minimum time between two messages, in seconds. The message that ends an
                output is not delayed.

        Raises:
            StatusError: the deadline passed, or the engine failed.
        """
        open_outputs = list(self.outputs)
        self.quiet = False
        while open_outputs:
            await self._until(lambda: any(output.pending for output in self.outputs))
            for output in open_outputs:
                if output.pending:
                    yield output.take()
            open_outputs = [output for output in open_outputs if not output.closed]
            if interval and open_outputs:
                self.quiet = True
                asyncio.get_running_loop().call_later(interval, self._resume)
                await self._until(lambda: not self.quiet or self._ending)

    def usage(self) -> pb.Usage:
        """Numbers of tokens of all outputs."""
        total = pb.Usage()
        for output in self.outputs:
            for field, count in output.usage().ListFields():
                setattr(total, field.name, getattr(total, field.name) + count)
        return total

    def notes(self) -> dict[str, Any]:
        """What the log line of the call says about it."""
        usage = self.usage()
        ends = {output.finish.name for output in self.outputs if output.finish is not None}
        timings = self.timings(self.outputs)
        times = {"queue_ms": timings.queue, "first_token_ms": timings.time_to_first_token}
        return {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            **{name: round(each.ToNanoseconds() / 1e6, 3) for name, each in times.items()},
            "ended": ", ".join(sorted(end.lower().replace("_", " ") for end in ends)),
        }

    def _resume(self) -> None:
        self.quiet = False
        self.changed.set()

    @property
    def _ending(self) -> bool:
        return any(output.finish is not None and not output.closed for output in self.outputs)

    async def _until(self, ready: Callable[[], bool]) -> None:
        while self.error is None and not ready():
            self.changed.clear()
            await self.changed.wait()
        if self.error is not None:
            raise self.error

    def timings(self, outputs: list[Output]) -> pb.Timings:
        """Times from the call's arrival: first start, first token and last token of ``outputs``."""
        starts = [output.started.at for output in outputs if output.started]
        firsts = [output.first_token_at for output in outputs if output.first_token_at]
        end = max(output.ended_at for output in outputs)
        timings = pb.Timings(total=self._since(end))
        if starts:
            timings.queue.CopyFrom(self._since(min(starts)))
        if firsts:
            timings.time_to_first_token.CopyFrom(self._since(min(firsts)))
        return timings

    def _since(self, at: float) -> Duration:
        duration = Duration()
        duration.FromNanoseconds(int((at - self.arrived) * 1e9))
        return duration
