"""Continue prompts with a decoder, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpt_dist.errors import GptDistError
from gpt_dist.inference.backends import Ids
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.lookup import Memory
from gpt_dist.inference.results import Scores
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT


def generate(
    model: GPT | Decoder,
    ids: Ids,
    sampling: SamplingParams | None = None,
    max_new_tokens: int = 128,
    past_context: bool = False,
) -> Iterator[int]:
    """Continue one prompt, token by token.

    It ends at a stop token, which is not returned, at the limit, and, unless ``past_context``, when
    the context is full. See `generate_many` for the errors.
    """
    params = [sampling or SamplingParams()]
    for _, token in generate_many(model, [ids], params, max_new_tokens, past_context):
        yield token


def kept_tokens(context: int) -> int:
    """How many of the last tokens stay when the window slides on from a full context."""
    return max(1, context // 2)


def generate_many(
    model: GPT | Decoder,
    prompts: Sequence[Ids],
    sampling: Sequence[SamplingParams],
    max_new_tokens: int = 128,
    past_context: bool = False,
) -> Iterator[tuple[int, int]]:
    """Continue several prompts side by side, as many at a time as there are slots.

    Args:
        model: a model (fp32 weights, as many slots as prompts), or a decoder with free slots.
        prompts: token ids; a common beginning is computed once.
        sampling: parameters, one for each prompt.
        max_new_tokens: maximum number of tokens for each prompt.
        past_context: go on when the context is full, with the last half of it as context. Of a
            prompt that is too long, use the last tokens that fit.

    Yields:
        (index of the prompt, token id), as they are chosen.

    Raises:
        UsageError: a prompt is empty, too long, or has ids that are not in the vocabulary.
    """
    if isinstance(model, Decoder):
        decoder = model
    else:
        slots = min(len(prompts), 32)
        decoder = Decoder(model, max_slots=slots, dtype="fp32", speculate=True)
    context = decoder.max_context
    begins = [list(ids)[-context:] if past_context else list(ids) for ids in prompts]
    texts = [list(begin) for begin in begins]
    waiting = list(zip(range(len(prompts)), sampling, strict=True))[::-1]
    running: dict[int, int] = {}
    memory = Memory()
    counts = [0] * len(prompts)
    try:
        while waiting or running:
            while waiting and max_new_tokens > 0:
                index, params = waiting[-1]
                begin = begins[index]
                if (place := decoder.place(begin[:-1])) is None:
                    break
                waiting.pop()
                decoder.admit(place)
                running[place.slot] = index
                decoder.prefill(place.slot, begin[place.length : -1], place.length)
                decoder.activate(place.slot, params, begin, memory)
            if not running:
                return
            result = decoder.step()
            for slot, token, last in zip(result.slots, result.tokens, result.last, strict=True):
                if slot not in running:  # it has ended, or is of another user of the decoder
                    continue
                index = running[slot]
                counts[index] += 1
                texts[index].append(token)
                stopped = token in sampling[index].stop_ids
                if not stopped:
                    yield index, token
                full = last and not decoder.room(slot)
                if stopped or counts[index] == max_new_tokens or (full and not past_context):
                    memory.add(texts[index][len(begins[index]) :])
                    decoder.free(slot)
                    del running[slot]
                elif full:
                    decoder.slide(slot, texts[index][-kept_tokens(context) :])
    finally:
        for slot in running:
            decoder.free(slot)


def score(decoder: Decoder, ids: Ids, top: int = 0, chunk: int = 128) -> Iterator[Scores]:
    """Log-probabilities of a text's tokens; other calls may come between two chunks.

    Args:
        decoder: where. The text takes a free slot until the last chunk.
        ids: the text. Its first token has no probability: scores start with the second.
        top: how many of the most likely tokens to list at each place.
        chunk: tokens that are run at a time.

    Raises:
        GptDistError: no slot is free.
        UsageError: it does not fit into the context, or an id is not in the vocabulary.
    """
    place = decoder.place([])  # all tokens are computed, whatever is cached
    if place is None:
        raise GptDistError(f"no slot is free to score a text: {decoder.max_slots} are in use")
    decoder.admit(place)
    try:
        for start in range(0, len(ids) - 1, chunk):
            yield decoder.score(place.slot, ids[start : start + chunk + 1], start, top)
    finally:
        decoder.free(place.slot)
