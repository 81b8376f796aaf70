"""Bodies of requests: their JSON types, and what they mean in ``gpt_dist.v1``."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt_dist.v1 import generation_service_pb2 as api
from serve.api.parsing import MAX_STOPS, MAX_TOP_LOGPROBS, Limits
from serve.api.status import invalid

MAX_PROMPTS = 2048
MAX_NESTED = MAX_PROMPTS + 64
"""Lists and objects of a body. To make a hundred thousand of them takes a tenth of a second."""
STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
DEFAULT_MAX_TOKENS = 16  # OpenAI's

TokenIds = list[Annotated[int, Field(ge=0, lt=1 << 32)]]
Prompt = str | list[int]
"""Text or token ids."""


class AnyBody(BaseModel):
    """A JSON object with known members only."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class StreamOptions(AnyBody):
    """How to stream."""

    include_usage: bool | None = None
    """Send the numbers of tokens in a last chunk without choices."""


class CompletionRequest(AnyBody):
    """What to continue, and how. Names and defaults are OpenAI's, further names vLLM's."""

    model: str = ""
    """The model. Empty: the one that is served."""
    prompt: Annotated[
        Any, Field(json_schema_extra={"anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
            {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items":
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}},
        ]}),
    ] = ""  # fmt: skip
    """A text, token ids, or a list of these. Its types are checked by `prompts`, lengths first."""
    max_tokens: int | None = None
    """Maximum number of new tokens: 16 by default. 0, with echo, only scores the prompt."""
    temperature: float | None = None
    """0 always chooses the most likely token; 1 by default."""
    top_p: float | None = None
    """Keep the most likely tokens up to this total probability."""
    n: int | None = None
    """Number of continuations of each prompt."""
    best_of: int | None = None
    """Only n is supported."""
    stream: bool | None = None
    """Send the text as it is generated, as server-sent events."""
    stream_options: StreamOptions | None = None
    """How to stream."""
    logprobs: int | None = None
    """Report the log-probability of every token, and this many of the most likely ones."""
    echo: bool | None = None
    """Begin with the prompt; with logprobs, score it too."""
    stop: str | list[str] | None = None
    """The text ends before the first of these."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that were generated."""
    frequency_penalty: float | None = None
    """Subtracted once for each time a token was generated."""
    logit_bias: dict[str, float] | None = None
    """Token id → what is added to its logit."""
    seed: int | None = None
    """Makes sampling reproducible. Continuation i uses seed + i."""
    user: str | None = None
    """Written to the log."""
    suffix: str | None = None
    """Not supported."""
    top_k: int | None = None
    """Keep this many of the most likely tokens; 0 or -1 keeps all."""
    min_p: float | None = None
    """Keep tokens at least this likely, relative to the most likely one."""
    repetition_penalty: float | None = None
    """Values above 1 make tokens of prompt and continuation less likely."""
    min_tokens: int | None = None
    """Minimum number of new tokens."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the continuation."""
    ignore_eos: bool | None = None
    """Continue after the end-of-text token."""
    include_stop_str_in_output: bool | None = None
    """End the text after the stop sequence instead of before it."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many tokens at the end of a longer prompt."""
    expected_weights_version: str = ""
    """Fail with 412 if the server has other weights."""
    cache_salt: str | None = None
    """Share cached prefixes only with requests that have the same salt."""
    priority: int | None = None
    """Of the caller's waiting requests lower ones go first: -10 to 10, by default 0."""


class TokenizeRequest(AnyBody):
    """A text to convert to token ids."""

    prompt: str
    """The text."""
    model: str = ""
    """The model. Empty: the one that is served."""


class DetokenizeRequest(AnyBody):
    """Token ids to convert to text."""

    tokens: TokenIds
    """The ids."""
    model: str = ""
    """The model. Empty: the one that is served."""


Body = TypeVar("Body", bound=AnyBody)

# JSON name → part of GenerationConfig, field.
FIELDS = {
    "temperature": ("sampling", "temperature"),
    "top_k": ("sampling", "top_k"),
    "top_p": ("sampling", "top_p"),
    "min_p": ("sampling", "min_p"),
    "repetition_penalty": ("sampling", "repetition_penalty"),
    "presence_penalty": ("sampling", "presence_penalty"),
    "frequency_penalty": ("sampling", "frequency_penalty"),
    "n": ("sampling", "n"),
    "min_tokens": ("stopping", "min_new_tokens"),
    "ignore_eos": ("stopping", "ignore_eos"),
    "include_stop_str_in_output": ("stopping", "include_stop_sequence"),
}


def parse(data: bytes, kind: type[Body]) -> Body:
    """Parse a body.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    if _nested(data) > MAX_NESTED and _nested(STRINGS.sub(b"", data)) > MAX_NESTED:
        raise invalid("", f"the body has more than {MAX_NESTED} lists and objects")
    try:
        # Several times as fast as the standard library, which held the event loop for 10 ms.
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise invalid("", f"the body is not JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise invalid("", "the body is not a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = str(first["loc"][0])[:100] if first["loc"] else ""
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            raise invalid(field, f"unknown; valid are {', '.join(kind.model_fields)}") from None
        raise invalid(field, first["msg"][:200]) from None


def _nested(data: bytes) -> int:
    return data.count(b"[") + data.count(b"{")


def prompts(body: CompletionRequest, limits: Limits) -> list[Prompt]:
    """The prompts of a request: a text, token ids, or a list of these.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    value = body.prompt
    if value is None or isinstance(value, str):
        return [value or ""]
    if not isinstance(value, list) or not value:
        raise invalid("prompt", "must be a text, token ids, or a list of these")
    keep = body.truncate_prompt_tokens
    if isinstance(value[0], int):
        return [_ids(value, keep, limits)]
    if len(value) > MAX_PROMPTS:
        raise invalid("prompt", f"has {len(value)} entries; valid are 1 to {MAX_PROMPTS}")
    return [entry if isinstance(entry, str) else _ids(entry, keep, limits) for entry in value]


def _ids(given: Any, keep: int | None, limits: Limits) -> list[int]:
    if not isinstance(given, list) or not given:
        raise invalid("prompt", "must be a text, token ids, or a list of these")
    value: list[int] = given
    if keep is not None and 1 <= keep <= limits.max_context:
        value = value[-keep:]
    if len(value) > limits.max_context:
        raise invalid(
            "prompt", f"has {len(value)} tokens; at most {limits.max_context} fit the context"
        )
    if not all(type(token) is int and 0 <= token < 1 << 32 for token in value):
        raise invalid("prompt", "has an entry that is not a token id")
    return value


def generation_request(body: CompletionRequest, prompt: Prompt) -> api.GenerateRequest:
    """The request for one prompt.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    request = api.GenerateRequest(
        model=body.model,
        expected_weights_version=body.expected_weights_version,
        cache_salt=body.cache_salt or "",
    )
    fill_prompt(request.prompt, prompt)
    config = request.config
    config.stopping.max_new_tokens = DEFAULT_MAX_TOKENS
    given = {name: getattr(body, name) for name in FIELDS}
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)  # vLLM keeps all with -1
    for name, value in given.items():
        if value is not None:
            part, field = FIELDS[name]
            _set(getattr(config, part), field, name, value)
    if body.max_tokens:
        _set(config.stopping, "max_new_tokens", "max_tokens", body.max_tokens)
    if body.priority is not None:
        _set(request, "priority", "priority", body.priority)
    if body.seed is not None:
        config.sampling.seed = body.seed % (1 << 64)
    if body.truncate_prompt_tokens is not None:
        name = "truncate_prompt_tokens"
        _set(config, name, name, body.truncate_prompt_tokens)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    config.stopping.stop_sequences.extend(stops[: MAX_STOPS + 1])
    try:
        config.stopping.stop_token_ids.extend(body.stop_token_ids or [])
    except (ValueError, OverflowError):
        raise invalid("stop_token_ids", "has an entry that is not a token id") from None
    for token, bias in (body.logit_bias or {}).items():
        if not token.isascii() or not token.isdecimal() or int(token[:11]) >= 1 << 32:
            raise invalid("logit_bias", f"{token[:20]!r} is not a token id")
        config.sampling.logit_bias[int(token)] = bias
    if body.logprobs is not None:
        if not 0 <= body.logprobs <= MAX_TOP_LOGPROBS:
            raise invalid("logprobs", f"is not between 0 and {MAX_TOP_LOGPROBS}")
        config.output.logprobs, config.output.top_logprobs = True, body.logprobs
    return request


def fill_prompt(message: Any, prompt: Prompt) -> None:
    """Set a Prompt to a text or to token ids."""
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)


def check(body: CompletionRequest) -> None:
    """Refuse what this server does not do.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    outputs = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != outputs:
        raise invalid("best_of", f"only n ({outputs}) is supported")
    if body.suffix:
        raise invalid("suffix", "is not supported")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "requires stream")
    if body.max_tokens is not None and body.max_tokens < (0 if body.echo else 1):
        raise invalid("max_tokens", "must be 1 or more, or 0 with echo")


def _set(message: Any, field: str, name: str, value: Any) -> None:
    try:
        setattr(message, field, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid(name, str(error)[:200]) from None
