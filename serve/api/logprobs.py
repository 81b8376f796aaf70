"""Messages that carry log-probabilities."""

from __future__ import annotations

import numpy as np

from gpt_dist.text.tokenizers import Tokenizer
from gpt_dist.v1 import generation_pb2 as pb
from gpt_dist.v1 import generation_service_pb2 as api
from serve.engine.jobs import Scored, Token


def token_logprob(tokenizer: Tokenizer, event: Token) -> pb.TokenLogprob:
    """Convert a generated token."""
    return _message(tokenizer, event.token, event.logprob, event.top)


def score_response(
    scored: Scored, ids: np.ndarray, tokenizer: Tokenizer, prepended: bool
) -> api.ScoreResponse:
    """Build the response to a ScoreRequest.

    Args:
        scored: the engine's result.
        ids: (T,) tokens that were scored.
        tokenizer: their tokenizer.
        prepended: whether the first token is the prepended end-of-text token.
    """
    response = api.ScoreResponse(weights_version=scored.weights_version)
    if not prepended:  # nothing precedes the first token, so it has no log-probability
        response.tokens.append(_message(tokenizer, int(ids[0]), None, []))
    for part in scored.parts:
        for row, logprob in enumerate(part.logprobs.tolist()):
            token = int(ids[part.start + row])
            top = zip(part.top_ids[row].tolist(), part.top_logprobs[row].tolist(), strict=True)
            response.tokens.append(_message(tokenizer, token, logprob, list(top)))
    values = [token.logprob for token in response.tokens if token.HasField("logprob")]
    response.total_logprob, response.scored_tokens = sum(values), len(values)
    response.usage.prompt_tokens = len(ids)
    return response


def _message(
    tokenizer: Tokenizer, token: int, logprob: float | None, top: list[tuple[int, float]]
) -> pb.TokenLogprob:
    """Build a message. ``top`` lists the most likely (token id, log-probability) at its place."""
    return pb.TokenLogprob(
        token_id=token,
        token=tokenizer.token_bytes(token),
        logprob=logprob,
        top=[
            pb.TopLogprob(token_id=other, token=tokenizer.token_bytes(other), logprob=value)
            for other, value in top
        ],
    )
