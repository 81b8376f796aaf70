"""Decoding: slots with a KV cache of fixed size, which advance together step by step.

A sequence lives in a slot::

    decoder = Decoder(model, max_slots=8)
    slot = decoder.free_slots[0]
    decoder.prefill(slot, ids[:-1])                  # in one piece or in chunks
    decoder.activate(slot, SamplingParams(top_k=50), ids)
    while ...:
        result = decoder.step()                      # one token or more for each active slot
    decoder.free(slot)

Slots join and leave between steps. `Decoder.place` and `Decoder.admit` choose the slot, and reuse
what another sequence with the same beginning has cached. A slot keeps the weights that it was
claimed with, so that `Decoder.use` swaps weights under running sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import torch

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.inference.backends import DType, Ids, make_backend, resolve_dtype
from gpt_dist.inference.checks import check_same_shape, checked_tokens
from gpt_dist.inference.lookup import Memory
from gpt_dist.inference.prefix_cache import Place, PrefixCache
from gpt_dist.inference.results import (
    PREFILL,
    Chosen,
    Chunk,
    Scores,
    StepResult,
    Weights,
    chosen,
)
from gpt_dist.inference.sampling import SamplingParams, log_probabilities
from gpt_dist.inference.slots import Slots
from gpt_dist.inference.speculation import Speculator, with_guesses
from gpt_dist.model.gpt import GPT


class Decoder:
    """A model that continues up to ``max_slots`` sequences at once.

    One thread at a time may use a decoder; only `load_weights` may run beside the others.

    Args:
        model: the weights are copied; the model itself is not kept.
        max_slots: sequences at once. Each takes its part of the cache from the start.
        max_context: positions of a slot, prompt and continuation; at most (and by default) the
            model's ``context_length``.
        device: where to run; by default where the model is. "mps" becomes the CPU, because
            Metal lacks the double precision that sampling needs.
        dtype: of the weights. "auto" is bf16 where that is faster, else fp32. "int8" has one scale
            per output of a layer.
        deterministic: a sequence's tokens do not depend on which other slots are active.
        speculate: guess tokens and verify several in a step where that is faster. The tokens are
            the same. Ignored on PyTorch's backend, where a row's rounding depends on the others.

    Raises:
        UsageError: ``max_context`` is beyond the model's.
    """

    def __init__(
        self,
        model: GPT,
        *,
        max_slots: int,
        max_context: int | None = None,
        device: torch.device | str | None = None,
        dtype: DType = "auto",
        deterministic: bool = False,
        speculate: bool = False,
    ) -> None:
        limit = model.config.context_length
        if max_context is not None and not 1 <= max_context <= limit:
            raise UsageError(f"max_context = {max_context}: the model's context is 1 to {limit}")
        if max_slots < 1:
            raise UsageError(f"max_slots = {max_slots}: must be 1 or more")
        self.max_slots, self.max_context = max_slots, max_context or limit
        self.vocab_size = model.vocab_size
        self.device = torch.device(device) if device is not None else model.wte.weight.device
        if self.device.type == "mps":
            self.device = torch.device("cpu")
        self.dtype = resolve_dtype(dtype, self.device)
        self.deterministic = deterministic
        self._config = model.config
        self._backend = make_backend(
            model, max_slots, self.max_context, self.device, self.dtype, deterministic
        )
        self.backend = self._backend.name
        """What computes: ``kernels-avx512``, ``kernels-avx2``, ``cuda-graphs`` or ``pytorch``."""
        self._prefixes = PrefixCache(max_slots, self.max_context, deterministic)
        rows = self._backend.rows_at_once
        self.speculator = Speculator(max_slots, rows) if speculate and rows else None
        self._slots = Slots(max_slots, self.max_context)
        self._collected: list[tuple[Weights, Chunk]] = []
        self._versions = 0
        self.weights = self.load_weights(model)

    def load_weights(self, model: GPT) -> Weights:
        """Prepare the weights of another model of the same shape. Slow; any thread may call it.

        Raises:
            UsageError: the model's shape differs.
        """
        check_same_shape(model.config, self._config)
        self._versions += 1
        return Weights(self._versions, self._backend.load(model))

    def use(self, weights: Weights) -> None:
        """Run sequences whose slots are claimed from now on with ``weights``.

        Running sequences keep their weights, which are freed when the last of them ends. Prefixes
        cached in free slots are dropped.
        """
        self.weights = weights
        for slot in self.free_slots:
            self.free(slot)

    @property
    def cache_bytes(self) -> int:
        """Memory that the KV cache takes, from the start."""
        return self._backend.cache_bytes

    @property
    def free_slots(self) -> list[int]:
        """Slots that hold no sequence, in ascending order. What was cached there is still valid."""
        return self._slots.free

    @property
    def active_slots(self) -> list[int]:
        """Slots that take part in the next step, in ascending order."""
        return sorted(self._slots.params)

    def length(self, slot: int) -> int:
        """Tokens of the slot that are in the cache, also after `free`."""
        return self._slots.length(slot)

    def tokens(self, slot: int, start: int = 0) -> list[int]:
        """Tokens of the slot that are in the cache, and for an active slot the one chosen last.

        Args:
            slot: which.
            start: index of the first token that is wanted.
        """
        cached = self._prefixes.tokens(slot, self.length(slot))[start:].tolist()
        active = slot in self._slots.params
        return [*cached, int(self._slots.tokens[slot])] if active else cached

    def room(self, slot: int) -> int:
        """Steps that the slot can still take part in."""
        return self.max_context - self.length(slot)

    def version(self, slot: int) -> int:
        """Version of the weights that the slot's cache was computed with; 0 if it is empty."""
        return self._slots.version(slot)

    def weights_of(self, slot: int) -> Weights:
        """The weights that the slot's cache was computed with, or will be."""
        return self._slots.weights[slot] or self.weights

    def place(
        self,
        prompt: Ids,
        most: int = 1 << 62,
        owner: str = "",
        weights: Weights | None = None,
    ) -> Place | None:
        """Choose a free slot for a prompt; None if there is none. Changes nothing.

        Args:
            prompt: all tokens that are to be prefilled; a cached prefix of them is reused.
            most: tokens that may be copied from slot to slot for this.
            owner: whose prompt it is; only the owner's prefixes are reused.
            weights: what will compute it, if not the newest weights.

        Raises:
            UsageError: it does not fit into the context, or an id is not in the vocabulary.
        """
        weights = weights or self.weights
        tokens, free = self._checked(prompt, 0), self.free_slots
        if not free:
            return None
        usable = np.array([bound is weights for bound in self._slots.weights])
        rows, highest = self._backend.rows, max(self._slots.claimed, default=0)
        least = rows(max(highest, free[0]))
        cheap = [slot for slot in free if rows(max(highest, slot)) == least]
        lengths = np.where(usable, self._slots.lengths, 0)
        return self._prefixes.place(tokens, lengths, free, cheap, most, owner)

    def admit(self, place: Place, owner: str = "", weights: Weights | None = None) -> None:
        """Claim the slot of a place that was just chosen, and cache the prefix that it reuses.

        ``owner`` and ``weights`` are those given to `place`.
        """
        slot = place.slot
        if place.refuge >= 0:
            self.copy_prefix(slot, place.refuge, self.length(slot))
            self._slots.claimed.discard(place.refuge)
        if place.length:
            self._prefixes.touch(place.source)
            self.copy_prefix(place.source, slot, place.length)
        else:
            self.prefill(slot, [])
            self._slots.weights[slot] = weights or self.weights
        self._prefixes.give(slot, owner)

    def prefill(self, slot: int, ids: Ids, start: int = 0) -> None:
        """Cache a chunk of a prompt and claim the slot.

        The prompt's last token may be left out: the first step runs it anyway. Short chunks are
        computed later, several together.

        Args:
            slot: where.
            ids: the chunk.
            start: position of its first token, at most `length`. At 0 the slot starts anew, on the
                newest weights unless it was claimed empty before.

        Raises:
            GptDistError: the slot is active, or ``start`` leaves a gap.
            UsageError: it does not fit into the context, or an id is not in the vocabulary.
        """
        tokens = self._checked(ids, start)
        weights = self._slots.extend(slot, start, self.weights)
        if len(tokens):
            self._collected.append((weights, Chunk(slot, tokens, start)))
        self._wrote(slot, start, tokens)
        if sum(len(chunk.ids) for _, chunk in self._collected) >= PREFILL:
            self.flush()

    def flush(self) -> None:
        """Compute what `prefill` has collected. Whatever needs it does this by itself."""
        for _, same in groupby(self._collected, key=lambda each: each[0].version):
            chunks = list(same)
            self._backend.prefill(chunks[0][0].data, [chunk for _, chunk in chunks])
        self._collected = []  # if that failed, no slot may go on as if it were computed

    def score(self, slot: int, ids: Ids, start: int = 0, top: int = 0) -> Scores:
        """Cache all but the last of ``ids`` as `prefill` does, and score all but the first.

        Args:
            slot: where.
            ids: two or more tokens of a text.
            start: position of the first of them in the text.
            top: how many of the most likely tokens to list at each place.

        Raises:
            GptDistError: the slot is active, or ``start`` leaves a gap.
            UsageError: it does not fit into the context, or an id is not in the vocabulary.
        """
        tokens = self._checked(ids, start)
        inputs, targets = tokens[:-1], torch.from_numpy(tokens[1:])
        weights = self._slots.extend(slot, start, self.weights)
        self.flush()
        logits = self._backend.logits(weights.data, Chunk(slot, inputs, start))
        self._wrote(slot, start, inputs)
        values, best = log_probabilities(logits, targets.to(logits.device), top)
        host = values.cpu().numpy()
        return Scores(start + 1, host[:, 0], best.cpu().numpy(), host[:, 1:])

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Cache the first ``length`` tokens of one slot in another, which it claims.

        The target continues on the weights of the source (see `version`).

        Raises:
            GptDistError: the source has fewer tokens, or the target is active.
        """
        if not 0 <= length <= self.length(source):
            raise GptDistError(f"slot {source} has {self.length(source)} tokens, not {length}")
        if target in self._slots.params:
            raise GptDistError(f"slot {target} is active")
        if target != source:
            self.flush()
            self._backend.copy(source, target, length)
            self._prefixes.copy(source, target, length)
        self._slots.weights[target] = self._slots.weights[source]
        self._slots.fill(target, length)

    def activate(
        self,
        slot: int,
        sampling: SamplingParams,
        ids: Ids,
        memory: Memory | None = None,
        generated: int = 0,
    ) -> None:
        """Let a prefilled slot take part in steps.

        Args:
            slot: where all of the prompt is cached, with or without its last token.
            sampling: how to continue.
            ids: the whole prompt; for a sequence that goes on, also what it has generated.
            memory: earlier outputs in which to look for guesses.
            generated: number of tokens at the end of ``ids`` that were generated.

        Raises:
            GptDistError: the prompt is not cached.
            UsageError: the prompt is empty, or an id is not in the vocabulary.
        """
        tokens = self._checked(ids, 0)
        if not len(tokens):
            raise UsageError("the prompt is empty: give at least one token")
        sampling.check_vocabulary(self.vocab_size)
        if len(tokens) == 1 and self.length(slot) == 0 and slot not in self._slots.params:
            self._slots.extend(slot, 0, self.weights)
        if not len(tokens) - 1 <= self.length(slot) <= len(tokens):
            raise GptDistError(
                f"slot {slot} has {self.length(slot)} tokens cached, not the prompt's {len(tokens)}"
            )
        self._backend.set(slot, sampling, tokens, generated)
        if self.speculator:
            self.speculator.begin(slot, memory)
        self._slots.activate(slot, sampling, tokens, generated)

    def step(self) -> StepResult:
        """One token for each active slot, and more where guesses were right.

        Raises:
            GptDistError: an active slot has no room left.
        """
        slots, groups = self._slots.active()
        if self._collected:
            self.flush()
        guesses = {}
        if self.speculator:
            # The last place in the cache is for the last token that was guessed rightly.
            room = lambda slot: self.room(slot) - 1  # noqa: E731
            guesses = self.speculator.propose(slots, self.tokens, room)
        rows = [row for group in groups for row in self._step(group, guesses)]
        if self.speculator and slots:
            self.speculator.learn()
        return StepResult.of(rows, {slot: len(guess) for slot, guess in guesses.items()})

    def _step(
        self, slots: np.ndarray, guesses: Mapping[int, Sequence[int]]
    ) -> list[tuple[int, Chosen]]:
        """Run a step of slots that have the same weights; what was chosen, with its slot."""
        state, weights = self._slots, self.weights_of(slots[0])
        ids, positions = state.tokens[slots], state.lengths[slots]
        if guesses:
            slots, ids, positions = with_guesses(slots, ids, positions, guesses)
        tokens, *details = self._backend.step(
            weights.data, slots, ids, positions, state.lengths, state.generated
        )
        if guesses:
            right = tokens >= 0
            slots, ids, positions, tokens = (a[right] for a in (slots, ids, positions, tokens))
            details = [detail[right] for detail in details]
        self._prefixes.append(slots, positions, ids)
        state.advance(slots, positions, tokens)
        asked = [state.params[slot].logprobs for slot in slots.tolist()]
        return list(
            zip(slots.tolist(), chosen(tokens, asked, details, self.vocab_size), strict=True)
        )

    def slide(self, slot: int, ids: Ids) -> None:
        """Make room in an active slot: cache only the last tokens of its sequence.

        They are computed again, as keys and values depend on positions. Penalties and draws still
        refer to the whole sequence.

        Args:
            slot: where.
            ids: the tokens that stay, up to the one chosen last.

        Raises:
            GptDistError: the slot is not active, or has fewer tokens.
            UsageError: an id is not in the vocabulary.
        """
        tokens = self._checked(ids, 0)
        dropped = self.length(slot) + 1 - len(tokens)
        if slot not in self._slots.params or not len(tokens) or dropped < 0:
            raise GptDistError(f"slot {slot} is not active with {len(tokens)} or more tokens")
        if len(tokens) > 1:
            self._backend.prefill(self.weights_of(slot).data, [Chunk(slot, tokens[:-1], 0)])
        self._prefixes.write(slot, 0, tokens[:-1])
        self._backend.slide(slot, dropped)
        if self.speculator:
            self.speculator.restart(slot)
        self._slots.lengths[slot], self._slots.tokens[slot] = len(tokens) - 1, tokens[-1]

    def free(self, slot: int) -> None:
        """End the slot's sequence; its cache stays for reuse while its weights are the newest."""
        self._slots.release(slot, self.weights)
        self._prefixes.touch(slot)

    def _checked(self, ids: Ids, start: int) -> np.ndarray:
        return checked_tokens(ids, start, self.max_context, self.vocab_size)

    def _wrote(self, slot: int, start: int, tokens: np.ndarray) -> None:
        """Note that ``tokens`` are the last that the slot has cached, and claim it."""
        self._prefixes.write(slot, start, tokens)
        self._slots.fill(slot, start + len(tokens))
