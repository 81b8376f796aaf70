"""Failures as HTTP statuses with OpenAI's error body."""

from __future__ import annotations

import math
import re
from typing import Any

from grpc import StatusCode

from serve.api.status import StatusError

STATUS = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.NOT_FOUND: 404,
    StatusCode.UNIMPLEMENTED: 404,
    StatusCode.FAILED_PRECONDITION: 412,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}
"""HTTP status of each code; 500 of any other."""
STATUS_OF_REASON = {"MESSAGE_TOO_LARGE": 413, "NO_MESSAGE": 408}
CODE = {
    "UNKNOWN_MODEL": "model_not_found",
    "UNAUTHENTICATED": "invalid_api_key",
    "QUEUE_FULL": "rate_limit_exceeded",
}
"""OpenAI's names for reasons; other reasons are their own, in lower case."""
FIELDS = {
    "prompt.text": "prompt",
    "prompt.token_ids": "prompt",
    "stop_sequences": "stop",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "include_stop_sequence": "include_stop_str_in_output",
    "top_logprobs": "logprobs",
}
"""Names of fields in JSON, where they are not those of ``gpt_dist.v1``."""


def status_of(error: StatusError) -> int:
    """The HTTP status of an error."""
    return STATUS_OF_REASON.get(error.reason) or STATUS.get(error.code, 500)


def parameter(field: str) -> str:
    """The JSON name of a field: ``config.stopping.stop_sequences[1]`` → ``stop[1]``."""
    if field.startswith("prompt"):
        return FIELDS.get(field, field)
    name = field.rpartition(".")[2]
    index = re.search(r"\[\d+\]\Z", name)
    if index is not None:
        name = name[: index.start()]
    return FIELDS.get(name, name) + (index[0] if index is not None else "")


def body(error: StatusError) -> dict[str, Any]:
    """OpenAI's error object."""
    status = status_of(error)
    kind = "invalid_request_error" if status < 429 else "server_error"
    param = parameter(error.field) if error.field else None
    message = error.message
    if param is not None and message.startswith(f"{error.field}: "):
        message = param + message.removeprefix(error.field)
    return {
        "error": {
            "message": message,
            "type": "rate_limit_error" if status == 429 else kind,
            "param": param,
            "code": CODE.get(error.reason, error.reason.lower()),
        }
    }


def headers(error: StatusError) -> dict[str, str]:
    """Headers of an error: when to try again, or that it is of no use."""
    status = status_of(error)
    found = {}
    if status == 401:
        found["www-authenticate"] = "Bearer"
    if error.retry_after is not None:
        found["retry-after"] = str(math.ceil(error.retry_after))
        found["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
    elif status >= 500:
        # OpenAI's clients repeat what failed with 5xx. A call that broke the engine of one server
        # must not be carried to the next.
        found["x-should-retry"] = "false"
    return found
