"""Validates request messages. An error names the field."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpt_dist.errors import UsageError
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.text.tokenizers import Tokenizer
from serve.api.heavy import Heavy
from serve.api.status import invalid, too_large

MAX_OUTPUTS = 64
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_TOKENS = 16, 256, 64
MAX_BIASES = 1024
MAX_SALT = 256
MAX_PRIORITY = 10
MAX_TOP_LOGPROBS = 20
DEFAULT_MAX_NEW_TOKENS = 128
RESPONSE_BYTES = 4 << 20
"""What a gRPC client reads by default."""
MAX_TEXT = 1 << 18
"""Characters or tokens that are converted at once."""
OPTION_BYTES = 1 << 16
"""What the options of a request take at most: stop sequences and biases."""

SAMPLING, STOPPING, OUTPUT = "config.sampling", "config.stopping", "config.output"
# Fields of SamplingParams that the API has elsewhere than in ``sampling``.
FIELDS = {
    "min_new_tokens": f"{STOPPING}.min_new_tokens",
    "stop_ids": f"{STOPPING}.stop_token_ids",
    "logprobs": f"{OUTPUT}.top_logprobs",
}


@dataclass(frozen=True)
class Limits:
    """Limits of the served model."""

    tokenizer: Tokenizer
    vocab_size: int
    """Of the model. The tokenizer may have fewer tokens."""
    max_context: int
    max_slots: int
    max_outputs: int
    longest_token: int
    """In bytes."""
    typical_token: int
    """In bytes: twice the mean over the vocabulary."""
    heavy: Heavy = field(default_factory=Heavy)
    """Does what would hold up the event loop."""

    @property
    def request_bytes(self) -> int:
        """No valid request is longer. Parsing a message takes time, whatever it holds."""
        return max(MAX_TEXT, self.max_context * self.longest_token) + OPTION_BYTES

    def response_bytes(self, outputs: int, tokens: int, top: int | None) -> int:
        """Estimate the size of a response.

        Args:
            outputs: number of outputs.
            tokens: of each of them.
            top: reported alternatives at each position; None without log-probabilities.
        """
        entry = self.typical_token + 13  # id, log-probability, and the tags and lengths of both
        logprobs = 0 if top is None else (top + 1) * entry
        return outputs * tokens * (self.typical_token + 4 + logprobs)


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
    expected_weights_version: str
    """Empty: any."""
    salt: str
    priority: int

    @property
    def least_new_tokens(self) -> int:
        """An output has at least so many tokens unless the context or its time ends."""
        if self.stops or self.sampling.stop_ids:
            return max(1, self.sampling.min_new_tokens)
        return self.max_new_tokens

    def sampling_of(self, index: int) -> SamplingParams:
        """The parameters of one output. Seeds are consecutive, modulo 2**64."""
        return replace(self.sampling, seed=(self.sampling.seed + index) % (1 << 64))


async def parse_generation(request: Any, limits: Limits, whole: bool = True) -> Generation:
    """Validate a GenerateRequest or GenerateStreamRequest.

    Args:
        request: the message.
        limits: of the model.
        whole: whether all outputs will be one message.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    config = request.config
    stopping, options = config.stopping, config.output
    outputs = config.sampling.n if config.sampling.HasField("n") else 1
    most = min(MAX_OUTPUTS, limits.max_outputs)
    if not 1 <= outputs <= most:
        raise invalid(f"{SAMPLING}.n", f"{outputs} is not between 1 and {most}")
    max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    if stopping.HasField("max_new_tokens"):
        max_new_tokens = stopping.max_new_tokens
        if max_new_tokens < 1:
            raise invalid(f"{STOPPING}.max_new_tokens", "must be 1 or more")
    if stopping.min_new_tokens > max_new_tokens:
        raise invalid(
            f"{STOPPING}.min_new_tokens",
            f"{stopping.min_new_tokens} exceeds max_new_tokens ({max_new_tokens})",
        )
    if len(stopping.stop_sequences) > MAX_STOPS:
        raise invalid(f"{STOPPING}.stop_sequences", f"more than {MAX_STOPS} sequences")
    for index, stop in enumerate(stopping.stop_sequences):
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            field = f"{STOPPING}.stop_sequences[{index}]"
            raise invalid(field, f"must have 1 to {MAX_STOP_LENGTH} characters")
    if len(stopping.stop_token_ids) > MAX_STOP_TOKENS:
        raise invalid(f"{STOPPING}.stop_token_ids", f"more than {MAX_STOP_TOKENS} tokens")
    if options.top_logprobs and not options.logprobs:
        raise invalid(f"{OUTPUT}.top_logprobs", "requires logprobs")
    if options.top_logprobs > MAX_TOP_LOGPROBS:
        raise invalid(f"{OUTPUT}.top_logprobs", f"exceeds {MAX_TOP_LOGPROBS}")
    time_budget = None
    if stopping.HasField("time_budget"):
        time_budget = stopping.time_budget.seconds + stopping.time_budget.nanos * 1e-9
        if time_budget <= 0:
            raise invalid(f"{STOPPING}.time_budget", "must be positive")
    keep = None
    if config.HasField("truncate_prompt_tokens"):
        keep = config.truncate_prompt_tokens
        if not 1 <= keep <= limits.max_context:
            raise invalid(
                "config.truncate_prompt_tokens",
                f"{keep} is not between 1 and {limits.max_context}",
            )
    eos_id = None if stopping.ignore_eos else limits.tokenizer.eot_id
    sampling = _sampling(config, eos_id, limits)
    ids = await parse_prompt(request.prompt, limits, keep=keep)
    tokens = min(max_new_tokens, limits.max_context - len(ids) + 1)
    size = limits.response_bytes(outputs if whole else 1, tokens, sampling.logprobs)
    if size > RESPONSE_BYTES:
        field = f"{OUTPUT}.top_logprobs" if options.top_logprobs else f"{SAMPLING}.n"
        raise too_large(field, size, RESPONSE_BYTES)
    return Generation(
        ids=ids,
        sampling=sampling,
        outputs=outputs,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        stops=tuple(dict.fromkeys(stopping.stop_sequences)),
        include_stop=stopping.include_stop_sequence,
        time_budget=time_budget,
        expected_weights_version=request.expected_weights_version,
        salt=parse_salt(request),
        priority=parse_priority(request),
    )


def _sampling(config: Any, eos_id: int | None, limits: Limits) -> SamplingParams:
    wanted, stopping, options = config.sampling, config.stopping, config.output
    if len(wanted.logit_bias) > MAX_BIASES:
        raise invalid(f"{SAMPLING}.logit_bias", f"more than {MAX_BIASES} entries")
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
        raise invalid(FIELDS.get(name, f"{SAMPLING}.{name}"), text[-200:]) from None
    if sampling.min_new_tokens and len(stop_ids) >= limits.vocab_size:
        raise invalid(f"{STOPPING}.stop_token_ids", "leaves no token for min_new_tokens")
    return sampling


def parse_salt(request: Any) -> str:
    """The salt of a request.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    salt: str = request.cache_salt
    if len(salt) > MAX_SALT:
        raise invalid("cache_salt", f"has more than {MAX_SALT} characters")
    return salt


def parse_priority(request: Any) -> int:
    """The priority of a request; 0 if it has none.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    priority: int = request.priority
    if abs(priority) > MAX_PRIORITY:
        raise invalid("priority", f"{priority} is not between -{MAX_PRIORITY} and {MAX_PRIORITY}")
    return priority


async def parse_prompt(
    prompt: Any, limits: Limits, room: int = 0, keep: int | None = None
) -> np.ndarray:
    """Token ids (T,) of a Prompt, 1 ≤ T ≤ ``max_context`` - ``room``.

    Args:
        prompt: the message.
        limits: of the model.
        room: tokens of the context that are not for the prompt.
        keep: keep only so many tokens at the end of a longer prompt.

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
            ids = await tokenize(prompt.text, limits, "prompt.text")
            if not ids:
                if limits.tokenizer.eot_id is None:
                    raise invalid(
                        "prompt.text", "is empty, and this tokenizer has no end-of-text token"
                    )
                ids = [limits.tokenizer.eot_id]
            field = "prompt.text"
        case "token_ids":
            given, field = prompt.token_ids.ids, "prompt.token_ids"
            if not given:
                raise invalid(field, "is empty")
            if keep is None and len(given) > longest:
                raise invalid(field, f"has {len(given)} tokens; at most {longest} fit the context")
            ids = list(given[-keep:] if keep is not None else given)
            if max(ids) >= limits.vocab_size:
                raise invalid(
                    field, f"token {max(ids)} is not between 0 and {limits.vocab_size - 1}"
                )
        case _:
            raise invalid("prompt", "text or token_ids must be set")
    if keep is not None:
        ids = ids[-keep:]
    if len(ids) > longest:
        raise invalid(field, f"has {len(ids)} tokens; at most {longest} fit the context")
    return np.array(ids, np.int64)


async def tokenize(text: str, limits: Limits, field: str) -> list[int]:
    """Token ids of a text.

    Raises:
        StatusError: INVALID_ARGUMENT, if the tokenizer cannot encode a character;
            RESOURCE_EXHAUSTED, if too many long texts wait.
    """
    try:
        return await limits.heavy.run(len(text), lambda: limits.tokenizer.encode(text))
    except UsageError as error:
        raise invalid(field, str(error)) from None
