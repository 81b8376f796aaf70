"""Continue prompts with a decoder, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpt_dist.inference.backends import Ids
from gpt_dist.inference.decoder import Decoder
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
        prompts: token ids; equal neighbours share one prefill.
        sampling: parameters, one for each prompt.
        max_new_tokens: the most tokens for each.
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
        decoder = Decoder(model, max_slots=min(len(prompts), 32), dtype="fp32")
    context = decoder.max_context
    begins = [list(ids)[-context:] if past_context else list(ids) for ids in prompts]
    texts = [list(begin) for begin in begins]
    waiting = list(zip(range(len(prompts)), sampling, strict=True))[::-1]
    running: dict[int, int] = {}
    whole: set[int] = set()  # slots that have their prompt in the cache
    counts = [0] * len(prompts)
    try:
        while waiting or running:
            while waiting and decoder.free_slots and max_new_tokens > 0:
                index, params = waiting.pop()
                slot, begin = decoder.free_slots[0], begins[index]
                twin = next((s for s in whole if begins[running[s]] == begin), None)
                if twin is None:
                    decoder.prefill(slot, begin[:-1])
                else:
                    decoder.copy_prefix(twin, slot, len(begin) - 1)
                decoder.activate(slot, params, begin)
                running[slot] = index
                whole.add(slot)
            if not running:
                return
            result = decoder.step()
            for slot, token in zip(result.slots, result.tokens, strict=True):
                if slot not in running:  # of another user of the same decoder
                    continue
                index = running[slot]
                counts[index] += 1
                texts[index].append(token)
                stopped = token in sampling[index].stop_ids
                if not stopped:
                    yield index, token
                full = not decoder.room(slot)
                if stopped or counts[index] == max_new_tokens or (full and not past_context):
                    decoder.free(slot)
                    del running[slot]
                    whole.discard(slot)
                elif full:
                    decoder.slide(slot, texts[index][-kept_tokens(context) :])
                    whole.discard(slot)
    finally:
        for slot in running:
            decoder.free(slot)
