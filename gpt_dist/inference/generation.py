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
) -> Iterator[int]:
    """Continue one prompt, token by token, until a stop token, the limit or a full context.

    A stop token is not returned. See `generate_many` for the errors.
    """
    for _, token in generate_many(model, [ids], [sampling or SamplingParams()], max_new_tokens):
        yield token


def generate_many(
    model: GPT | Decoder,
    prompts: Sequence[Ids],
    sampling: Sequence[SamplingParams],
    max_new_tokens: int = 128,
) -> Iterator[tuple[int, int]]:
    """Continue several prompts side by side, as many at a time as there are slots.

    Args:
        model: a model (fp32 weights, as many slots as prompts), or a decoder with free slots.
        prompts: token ids; equal neighbours share one prefill.
        sampling: parameters, one for each prompt.
        max_new_tokens: the most tokens for each.

    Yields:
        (index of the prompt, token id), as they are chosen.

    Raises:
        UsageError: a prompt is empty, too long, or has ids that are not in the vocabulary.
    """
    if isinstance(model, Decoder):
        decoder = model
    else:
        decoder = Decoder(model, max_slots=min(len(prompts), 32), dtype="fp32")
    waiting = list(enumerate(zip(prompts, sampling, strict=True)))[::-1]
    running: dict[int, int] = {}
    counts = [0] * len(prompts)
    try:
        while waiting or running:
            while waiting and decoder.free_slots and max_new_tokens > 0:
                index, (ids, params) = waiting.pop()
                slot, tokens = decoder.free_slots[0], list(ids)
                twin = next((s for s, i in running.items() if list(prompts[i]) == tokens), None)
                if twin is None:
                    decoder.prefill(slot, tokens[:-1])
                else:
                    decoder.copy_prefix(twin, slot, len(tokens) - 1)
                decoder.activate(slot, params, tokens)
                running[slot] = index
            if not running:
                return
            result = decoder.step()
            for slot, token in zip(result.slots, result.tokens, strict=True):
                if slot not in running:  # of another user of the same decoder
                    continue
                index = running[slot]
                counts[index] += 1
                stopped = token in sampling[index].stop_ids
                if not stopped:
                    yield index, token
                if stopped or counts[index] == max_new_tokens or not decoder.room(slot):
                    decoder.free(slot)
                    del running[slot]
    finally:
        for slot in running:
            decoder.free(slot)
