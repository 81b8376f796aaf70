"""Validates request messages. An error names the field."""

from __future__ import annotations

import asyncio
import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpt_dist.errors import UsageError
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.text.tokenizers import Tokenizer
from serve.api.status import invalid

MAX_OUTPUTS = 64
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_TOKENS = 16, 256, 64
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
DEFAULT_MAX_NEW_TOKENS = 128
LONG_TEXT = 8192
"""A text of at least this many characters is tokenised in a thread, to keep the event loop free."""

# Fields of SamplingParams that the API has elsewhere than in ``sampling``.
FIELDS = {
    "min_new_tokens": "stopping.min_new_tokens",
    "stop_ids": "stopping.stop_token_ids",
    "logprobs": "output.top_logprobs",
}


@dataclass(frozen=True)
class Limits:
    """Limits of the served model."""

    tokenizer: Tokenizer
    vocab_size: int
    """Of the model. The tokenizer may have fewer tokens."""
    max_context: int
    max_outputs: int
    longest_token: int
    """In bytes."""


@dataclass(frozen=True)
class Generation:
    """A valid generation request."""

    ids: np.ndarray
    """(T,) int64."""
    sampling: SamplingParams
    """Of the first output. See `sampling_of`."""
    outputs: int
    max_new_tokens: int
    eos_id: int | None
    stops: tuple[str, ...]
    include_stop: bool
    time_budget: float | None
    """Seconds."""

    def sampling_of(self, index: int) -> SamplingParams:
        """The parameters of one output. Seeds are consecutive, modulo 2**64."""
        return replace(self.sampling, seed=(self.sampling.seed + index) % (1 << 64))


async def parse_generation(request: Any, limits: Limits) -> Generation:
    """Validate a GenerateRequest or GenerateStreamRequest.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    stopping, options = request.stopping, request.output
    outputs = request.sampling.n if request.sampling.HasField("n") else 1
    most = min(MAX_OUTPUTS, limits.max_outputs)
    if not 1 <= outputs <= most:
        raise invalid("sampling.n", f"{outputs} is not between 1 and {most}")
    max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    if stopping.HasField("max_new_tokens"):
        max_new_tokens = stopping.max_new_tokens
        if max_new_tokens < 1:
            raise invalid("stopping.max_new_tokens", "must be 1 or more")
    if stopping.min_new_tokens > max_new_tokens:
        raise invalid(
            "stopping.min_new_tokens",
            f"{stopping.min_new_tokens} exceeds max_new_tokens ({max_new_tokens})",
        )
    if len(stopping.stop_sequences) > MAX_STOPS:
        raise invalid("stopping.stop_sequences", f"more than {MAX_STOPS} sequences")
    for index, stop in enumerate(stopping.stop_sequences):
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            field = f"stopping.stop_sequences[{index}]"
            raise invalid(field, f"must have 1 to {MAX_STOP_LENGTH} characters")
    if len(stopping.stop_token_ids) > MAX_STOP_TOKENS:
        raise invalid("stopping.stop_token_ids", f"more than {MAX_STOP_TOKENS} tokens")
    if options.top_logprobs and not options.logprobs:
        raise invalid("output.top_logprobs", "requires logprobs")
    if options.top_logprobs > MAX_TOP_LOGPROBS:
        raise invalid("output.top_logprobs", f"exceeds {MAX_TOP_LOGPROBS}")
    time_budget = None
    if stopping.HasField("time_budget"):
        time_budget = stopping.time_budget.seconds + stopping.time_budget.nanos * 1e-9
        if time_budget <= 0:
            raise invalid("stopping.time_budget", "must be positive")
    eos_id = None if stopping.ignore_eos else limits.tokenizer.eot_id
    sampling = _sampling(request, eos_id, limits)
    return Generation(
        ids=await parse_prompt(request.prompt, limits),
        sampling=sampling,
        outputs=outputs,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        stops=tuple(dict.fromkeys(stopping.stop_sequences)),
        include_stop=stopping.include_stop_sequence,
        time_budget=time_budget,
    )


def _sampling(request: Any, eos_id: int | None, limits: Limits) -> SamplingParams:
    wanted, stopping, options = request.sampling, request.stopping, request.output
    if len(wanted.logit_bias) > MAX_BIASES:
        raise invalid("sampling.logit_bias", f"more than {MAX_BIASES} entries")
    given: dict[str, Any] = {
        name: getattr(wanted, name)
        for name in ("temperature", "top_p", "repetition_penalty")
        if wanted.HasField(name)
    }
    stop_ids = {*stopping.stop_token_ids, *([] if eos_id is None else [eos_id])}
    try:
        sampling = SamplingParams(
            **given,
            top_k=wanted.top_k,
            min_p=wanted.min_p,
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            logit_bias=dict(wanted.logit_bias),
            seed=wanted.seed if wanted.HasField("seed") else secrets.randbits(53),
            min_new_tokens=stopping.min_new_tokens,
            stop_ids=tuple(sorted(stop_ids)),
            logprobs=options.top_logprobs if options.logprobs else None,
        )
        sampling.check_vocabulary(limits.vocab_size)
    except UsageError as error:
        name, text = re.split(r" = |: ", str(error), maxsplit=1)
        raise invalid(FIELDS.get(name, f"sampling.{name}"), text[-200:]) from None
    if sampling.min_new_tokens and len(stop_ids) >= limits.vocab_size:
        raise invalid("stopping.stop_token_ids", "leaves no token for min_new_tokens")
    return sampling


async def parse_prompt(prompt: Any, limits: Limits, room: int = 0) -> np.ndarray:
    """Token ids (T,) of a Prompt, 1 ≤ T ≤ ``max_context`` - ``room``.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    longest = limits.max_context - room
    match prompt.WhichOneof("input"):
        case "text":
            # Do not tokenise a text that cannot fit.
            if len(prompt.text) > longest * limits.longest_token:
                raise invalid(
                    "prompt.text", f"is too long: at most {longest} tokens fit the context"
                )
            ids = await tokenize(prompt.text, limits.tokenizer, "prompt.text")
            if not ids:
                if limits.tokenizer.eot_id is None:
                    raise invalid(
                        "prompt.text", "is empty, and this tokenizer has no end-of-text token"
                    )
                ids = [limits.tokenizer.eot_id]
            field = "prompt.text"
        case "token_ids":
            ids, field = list(prompt.token_ids.ids), "prompt.token_ids"
            if not ids:
                raise invalid(field, "is empty")
            if max(ids) >= limits.vocab_size:
                raise invalid(
                    field, f"token {max(ids)} is not between 0 and {limits.vocab_size - 1}"
                )
        case _:
            raise invalid("prompt", "text or token_ids must be set")
    if len(ids) > longest:
        raise invalid(field, f"has {len(ids)} tokens; at most {longest} fit the context")
    return np.array(ids, np.int64)


async def tokenize(text: str, tokenizer: Tokenizer, field: str) -> list[int]:
    """Token ids of a text.

    Raises:
        StatusError: INVALID_ARGUMENT, if the tokenizer cannot encode a character.
    """
    try:
        if len(text) < LONG_TEXT:
            return tokenizer.encode(text)
        return await asyncio.to_thread(tokenizer.encode, text)
    except UsageError as error:
        raise invalid(field, str(error)) from None
