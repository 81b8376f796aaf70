"""From logits to the next token: penalties, truncation and a draw, for many slots at once.

The processors agree with those of Hugging Face ``transformers`` and run in its order::

    logit_bias → repetition_penalty → frequency and presence penalty → stop tokens before
    min_new_tokens → temperature → top_k → top_p → min_p → draw

(transformers has no presence and frequency penalty: they are OpenAI's, over generated tokens only;
the repetition penalty looks at prompt and generated tokens.) Ties with the last kept token are
kept. A draw inverts the cumulative distribution, in order of token id, at one uniform number that
is a hash of (seed, position): what a sequence draws never depends on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gpt_dist.errors import UsageError
from gpt_dist.ops.decode import signed, uniform

MAX_LOGPROBS = 100
"""Most alternatives that a result can list for a token."""
LEAST = 1e-30
"""Smaller divisors of logits count as this, whose reciprocal is finite in fp32."""


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is continued.

    Raises:
        UsageError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens that have at least this much probability together."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1: make tokens of the prompt and the continuation less likely (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each generated token."""
    frequency_penalty: float = 0.0
    """Subtracted from a logit once for each time the token was generated."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int = 0
    """Fixes the draws, together with the position in the sequence; 64 bits."""
    min_new_tokens: int = 0
    """``stop_ids`` cannot be drawn before this many tokens."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the sequence. The decoder only masks them; the caller stops."""
    logprobs: int | None = None
    """Report the log-probability of each token, and of this many of the most likely ones."""

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature <= 100, "0 to 100"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0, at most 100"),
            "presence_penalty": (abs(self.presence_penalty) <= 100, "-100 to 100"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 100, "-100 to 100"),
            "logit_bias": (
                all(abs(bias) <= 1000 for bias in self.logit_bias.values()),
                "-1000 to 1000 for each token id",
            ),
            "seed": (0 <= self.seed < 1 << 64, "0 to 2^64 - 1"),
            "min_new_tokens": (self.min_new_tokens >= 0, "0 or more"),
            "logprobs": (
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"0 to {MAX_LOGPROBS}",
            ),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise UsageError(f"{name} = {getattr(self, name)}: must be {expected}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a ``UsageError`` that names the field of an id that is not in the vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_ids", self.stop_ids)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise UsageError(f"{name}: token {token} is not in 0 to {vocab_size - 1}")

    @property
    def divisors(self) -> tuple[float, float]:
        """Temperature, 0 for greedy, and repetition penalty, in a range where fp32 divides."""
        temperature = max(self.temperature, LEAST) if self.temperature else 0.0
        return temperature, max(self.repetition_penalty, LEAST)

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


@dataclass(frozen=True)
class Plan:
    """Which stages a batch needs: known on the host, so that a step needs no synchronisation."""

    bias: bool = False
    penalties: bool = False
    stops: bool = False
    draw: bool = False
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    logprobs: int | None = None


class Sampler:
    """The sampling state of every slot as tensors on one device, and the batched draw.

    Args:
        slots: how many sequences there can be at once.
        vocab_size: V; logits may have more columns (padding), which are never drawn.
        device: where the logits are.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.params: list[SamplingParams | None] = [None] * slots
        # Columns: temperature, top_p, log(min_p), repetition, presence, frequency.
        self.scales = torch.ones(slots, 6, device=device)
        # Columns: top_k, seed, min_new_tokens.
        self.numbers = torch.ones(slots, 3, dtype=torch.int64, device=device)
        # Bits: 1 bias, 2 penalties, 4 stop tokens.
        self.flags = torch.zeros(slots, dtype=torch.int32, device=device)
        self._tables: dict[str, Tensor] = {}

    def all_tables(self) -> list[Tensor]:
        """Bias, count, prompt and stop, made now where they are not there yet."""
        kinds = {"bias": torch.float32, "count": torch.int32, "prompt": torch.bool}
        kinds["stop"] = torch.bool
        tables = [self._table(name, kind) for name, kind in kinds.items()]
        return [table.view(torch.int8) if table.dtype == torch.bool else table for table in tables]

    def _table(self, name: str, dtype: torch.dtype) -> Tensor:
        """A (slots, V) tensor of zeros, made when it is first needed."""
        if name not in self._tables:
            shape = (len(self.params), self.vocab_size)
            self._tables[name] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self._tables[name]

    @torch.inference_mode()
    def set(
        self,
        slot: int,
        params: SamplingParams,
        ids: Sequence[int] | np.ndarray,
        generated: int = 0,
    ) -> None:
        """Give a slot its parameters.

        Args:
            slot: which.
            params: its parameters.
            ids: the prompt, and what was generated so far.
            generated: number of tokens at the end of ``ids`` that were generated.
        """
        self.params[slot] = params
        temperature, repetition = params.divisors
        self.scales[slot] = torch.tensor(
            [
                temperature or 1.0,
                params.top_p,
                math.log(params.min_p) if params.min_p else -math.inf,
                repetition,
                params.presence_penalty,
                params.frequency_penalty,
            ]
        )
        top_k = (
            1 if params.temperature == 0 else min(params.top_k or self.vocab_size, self.vocab_size)
        )
        self.numbers[slot] = torch.tensor(
            [top_k, signed(params.seed), params.min_new_tokens], dtype=torch.int64
        )
        early = bool(params.stop_ids) and params.min_new_tokens > 0
        self.flags[slot] = bool(params.logit_bias) + 2 * params.penalised + 4 * early
        if params.penalised:
            start = len(ids) - generated
            before, after = np.split(np.asarray(ids, np.int64), [start])
            counts = np.bincount(after, minlength=self.vocab_size).astype(np.int32)
            self._table("count", torch.int32)[slot] = torch.from_numpy(counts).to(self.device)
            prompt = self._table("prompt", torch.bool)
            prompt[slot] = False
            prompt[slot, torch.from_numpy(np.unique(before)).to(self.device)] = True
        elif "count" in self._tables:  # others read the tables too, with penalties of nothing
            self._tables["count"][slot] = 0
        for name, dtype, ids_of, values in (
            ("bias", torch.float32, tuple(params.logit_bias), tuple(params.logit_bias.values())),
            ("stop", torch.bool, params.stop_ids if params.min_new_tokens else (), True),
        ):
            if ids_of or name in self._tables:
                row = self._table(name, dtype)[slot]
                row.zero_()
                if ids_of:
                    row[torch.tensor(ids_of, device=self.device)] = torch.tensor(
                        values, dtype=dtype, device=self.device
                    )

    def plan(self, slots: Sequence[int]) -> Plan:
        """The stages that these slots need together."""
        every = [params for slot in slots if (params := self.params[slot]) is not None]
        drawn = [params for params in every if params.temperature > 0]
        asked = [params.logprobs for params in every if params.logprobs is not None]
        return Plan(
            bias=any(params.logit_bias for params in every),
            penalties=any(params.penalised for params in every),
            stops=any(params.min_new_tokens and params.stop_ids for params in every),
            draw=bool(drawn),
            # A slot without top_k needs no kth value; rounding up keeps the variants few.
            top_k=_round_up(max((params.top_k for params in drawn), default=0), self.vocab_size),
            top_p=any(params.top_p < 1 for params in drawn),
            min_p=any(params.min_p > 0 for params in drawn),
            logprobs=_round_up(max(asked), MAX_LOGPROBS) if asked else None,
        )

    def sample(
        self, logits: Tensor, plan: Plan, positions: Tensor, generated: Tensor, active: Tensor
    ) -> tuple[Tensor, ...]:
        """Choose a token for slots 0 to n - 1.

        Args:
            logits: (n, at least V) in fp32.
            plan: the stages to run, at least those that the active slots need.
            positions: (n,) index in its sequence of the token to be chosen.
            generated: (n,) tokens generated before it.
            active: (n,) 1 where the slot takes part, 0 where its row is to be ignored.

        Returns:
            tokens (n,) int64; log-probabilities (n, 1 + N) fp32 and token ids (n, N) of the N
            most likely tokens, before any processing, if ``plan.logprobs`` is not None.
        """
        logits = logits[:, : self.vocab_size]
        scores = self._process(logits, plan, generated)
        tokens = self._draw(scores, plan, positions) if plan.draw else scores.argmax(1)
        if plan.penalties:
            count = self._table("count", torch.int32)[: len(logits)]
            count.scatter_add_(1, tokens[:, None], active[:, None].int())
        if plan.logprobs is None:
            return (tokens,)
        return (tokens, *log_probabilities(logits, tokens, plan.logprobs))

    def _process(self, logits: Tensor, plan: Plan, generated: Tensor) -> Tensor:
        rows, scores = len(logits), logits
        if plan.bias:
            scores = scores + self._table("bias", torch.float32)[:rows]
        if plan.penalties:
            count = self._table("count", torch.int32)[:rows]
            repetition, presence, frequency = self.scales[:rows, 3:, None].unbind(1)
            seen = self._table("prompt", torch.bool)[:rows] | (count > 0)
            penalised = torch.where(scores < 0, scores * repetition, scores / repetition)
            scores = torch.where(seen, penalised, scores)
            scores = scores - (frequency * count + presence * (count > 0))
        if plan.stops:
            early = (generated < self.numbers[:rows, 2])[:, None]
            scores = scores.masked_fill(self._table("stop", torch.bool)[:rows] & early, -math.inf)
        return scores

    def _draw(self, scores: Tensor, plan: Plan, positions: Tensor) -> Tensor:
        rows = len(scores)
        temperature, top_p, log_min_p = self.scales[:rows, :3, None].unbind(1)
        highest = scores.amax(1, keepdim=True)

        def weigh(kept: Tensor) -> Tensor:
            """Relative probabilities; subtracting first keeps tiny temperatures finite."""
            return ((kept - highest) / temperature).exp()

        top_k = self.numbers[:rows, :1]
        # All truncation is one threshold a row, on the logits, as in the CPU kernels.
        threshold = torch.full_like(highest, -math.inf)
        if plan.top_k:
            best = top_values(scores, plan.top_k)
            kth = best.gather(1, (top_k - 1).clamp(max=plan.top_k - 1))
            threshold = torch.where(top_k <= plan.top_k, kth, threshold)
        threshold = torch.where(top_k == 1, highest, threshold)
        if plan.top_p:
            kept = scores.masked_fill(scores < threshold, -math.inf)
            ordered = kept.sort(dim=1, descending=True).values
            mass = weigh(ordered).cumsum(1, dtype=torch.float64)
            # Kept while the tokens before it have less than top_p of the mass.
            count = (mass < top_p.double() * mass[:, -1:]).sum(1, keepdim=True)
            last = ordered.gather(1, count.clamp(max=self.vocab_size - 1))
            threshold = torch.where(top_p < 1, torch.maximum(threshold, last), threshold)
        if plan.min_p:
            threshold = torch.maximum(threshold, highest + temperature * log_min_p)
        kept = scores.masked_fill(scores < threshold, -math.inf)
        mass = weigh(kept).cumsum(1, dtype=torch.float64)
        target = uniform(self.numbers[:rows, 1], positions)[:, None] * mass[:, -1:]
        drawn = torch.searchsorted(mass, target, right=True).squeeze(1)
        greedy = self.numbers[:rows, 0] == 1  # top_k 1, which ties must not widen
        return torch.where(greedy, scores.argmax(1), drawn).clamp(max=self.vocab_size - 1)


def top_values(scores: Tensor, count: int) -> Tensor:
    """The ``count`` highest values of each row, in descending order, without sorting the row.

    The best ``count`` values lie in the ``count`` blocks with the highest maxima, so that only
    those blocks are searched.
    """
    block = 128
    rows, columns = scores.shape
    blocks = math.ceil(columns / block)
    if 2 * count >= blocks:
        return scores.topk(min(count, columns), dim=1).values
    if columns % block:
        scores = torch.nn.functional.pad(scores, (0, blocks * block - columns), value=-math.inf)
    scores = scores.view(rows, blocks, block)
    best = scores.amax(2).topk(count, dim=1, sorted=False).indices
    chosen = scores.gather(1, best[:, :, None].expand(-1, -1, block)).flatten(1)
    return chosen.topk(count, dim=1).values


def log_probabilities(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Natural log-probabilities of ``tokens`` and of the ``top`` most likely tokens.

    Args:
        logits: (n, V) fp32.
        tokens: (n,) token ids.
        top: how many alternatives.

    Returns:
        (n, 1 + top) log-probabilities, the token's own first, then in descending order; and the
        (n, top) ids of the latter.
    """
    values, ids = logits.topk(min(top, logits.shape[1]), dim=1)
    own = logits.gather(1, tokens[:, None])
    return torch.cat((own, values), 1) - logits.logsumexp(1, keepdim=True), ids


def _round_up(count: int, limit: int) -> int:
    """``count``, or the next power of two so that there are few variants; 0 stays 0."""
    return min(1 << (count - 1).bit_length(), limit) if count else 0
