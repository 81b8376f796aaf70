"""The decoder's arithmetic in C++ kernels for CPUs with AVX2 or AVX-512 (`gpt_dist.ops.build`).

The cache is fp32 for fp32 weights and bf16 otherwise. The residual stream, layer norms, softmax and
logits are always fp32. int8 gives each output's weights one scale, and quantises the activations of
a token at run time with one scale for 64 of them. A token's result never depends on the rest of the
batch, so decoding is always deterministic here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gpt_dist.inference import cpu_kernels as kernels
from gpt_dist.inference.results import PREFILL, Chunk
from gpt_dist.inference.sampling import MAX_LOGPROBS, SamplingParams
from gpt_dist.model.gpt import GPT, Block
from gpt_dist.ops.build import instruction_set


@dataclass(frozen=True)
class CpuWeights:
    """Packed weights and the memory that they point into."""

    model: kernels.Model
    keep: list[Any]


class CpuBackend:
    """Has the interface of `torch_backend.TorchBackend`, and its results up to rounding."""

    def __init__(self, model: GPT, slots: int, context: int, dtype: str) -> None:
        library = kernels.decoder_library()
        assert library is not None
        self._library, self.dtype = library, dtype
        self.name = f"kernels-{instruction_set()}"
        self.threads = torch.get_num_threads()
        config = model.config
        head_size = config.head_size
        context = -(-context // 16) * 16  # keys lie in tiles of 16 positions
        sizes = -(-head_size // 2) * 2, -(-head_size // 16) * 16
        stored = torch.float32 if dtype == "fp32" else torch.bfloat16
        heads = config.n_layer * slots * config.kv_heads
        self._keys, self._values = (
            kernels.buffer(heads * context * size * stored.itemsize)
            .view(stored)
            .view(config.n_layer, slots, config.kv_heads, context * size)
            for size in sizes
        )
        self._sizes = sizes
        self.cache_bytes = self._keys.nbytes + self._values.nbytes
        self._cache = kernels.Cache(self._keys.data_ptr(), self._values.data_ptr(), slots, context)
        self.rows_at_once = max(slots, PREFILL)
        self._inputs = np.zeros((3, self.rows_at_once), np.int32)
        self._stride = -(-model.vocab_size // 64) * 64
        self._vocab_size = model.vocab_size
        self._logits = torch.zeros(self.rows_at_once, self._stride)
        self._draws = (kernels.Draw * slots)()
        # Tokens of each slot's whole sequence, with room for those that still fit the cache.
        self._history = [np.zeros(0, np.int32)] * slots
        self._tables: list[list[np.ndarray]] = [[] for _ in range(slots)]
        self._tokens = np.zeros(self.rows_at_once, np.int32)
        self._logprobs = np.zeros((self.rows_at_once, 1 + MAX_LOGPROBS), np.float32)
        self._top_ids = np.zeros((self.rows_at_once, MAX_LOGPROBS), np.int32)
        # Looking up an address takes a microsecond, and a small model's step not many.
        self._addresses = [row.ctypes.data for row in self._inputs]
        outputs = self._tokens, self._logprobs, self._top_ids
        self._outputs = [array.ctypes.data for array in outputs]
        self._scratch: Tensor | None = None

    def load(self, model: GPT) -> CpuWeights:
        """Pack the weights of ``model`` in this decoder's dtype."""
        keep: list[Any] = []
        config, parts = model.config, model.config.parts

        def linear(module: Any) -> kernels.Linear:
            return kernels.pack(module.weight, module.bias, self.dtype, keep)

        def norm(module: Any, exists: bool = True) -> kernels.Norm:
            return kernels.norm(module, parts.norm, keep) if exists else kernels.Norm()

        layers = (kernels.Layer * config.n_layer)(
            *(
                kernels.Layer(
                    norm(block.ln_1), norm(block.ln_2),
                    linear(block.attn.c_attn), linear(block.attn.c_proj),
                    linear(block.mlp.c_fc), linear(block.mlp.c_proj),
                )
                for block in cast(Iterable[Block], model.h)
            )
        )  # fmt: skip
        keep.append(layers)
        final = config.n_layer > 0 and config.norm == "pre"
        shape = kernels.Model(
            dtype=kernels.DTYPES[self.dtype],
            pre_norm=config.norm == "pre",
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_kv_head=config.kv_heads,
            head_size=config.head_size,
            width=config.n_embd,
            hidden=config.hidden,
            activation=kernels.ACTIVATIONS[parts.activation],
            turned_eps=parts.eps,
            wte=kernels.pointer(kernels.own(model.wte.weight, keep)),
            wpe=kernels.pointer(kernels.own(model.wpe.weight, keep)) if model.wpe else None,
            rotations=kernels.rotations(config, keep),
            layers=layers,
            first_norm=norm(model.ln_e, parts.norm_embedding),
            final_norm=norm(model.ln_f, final),
            head=kernels.pack(
                model.head_weight[: model.vocab_size], None, self.dtype, keep, parts.soft_cap
            ),
        )
        return CpuWeights(shape, keep)

    def set(
        self,
        slot: int,
        params: SamplingParams,
        ids: Sequence[int] | np.ndarray,
        generated: int = 0,
    ) -> None:
        """Give a slot its sampling parameters; as `Sampler.set`."""
        stops = np.array(params.stop_ids if params.min_new_tokens else (), np.int32)
        biased = np.array(list(params.logit_bias), np.int32)
        bias = np.array(list(params.logit_bias.values()), np.float32)
        self._tables[slot] = [stops, biased, bias]
        self._history[slot] = np.zeros(self._cache.context + 1, np.int32)
        self._history[slot][: len(ids)] = ids
        temperature, repetition = params.divisors
        self._draws[slot] = kernels.Draw(
            temperature, params.top_p,
            math.log(params.min_p) if params.min_p else -math.inf,
            repetition, params.presence_penalty, params.frequency_penalty,
            params.top_k, -1 if params.logprobs is None else params.logprobs,
            len(ids) - generated, len(ids), params.min_new_tokens, len(stops), len(biased),
            params.seed,
            self._history[slot].ctypes.data,
            stops.ctypes.data, biased.ctypes.data, bias.ctypes.data,
        )  # fmt: skip

    def slide(self, slot: int, dropped: int) -> None:
        """Note that the slot's sequence has ``dropped`` more tokens than its cache holds."""
        self._history[slot] = np.append(self._history[slot], np.zeros(dropped, np.int32))
        self._draws[slot].history = self._history[slot].ctypes.data

    def rows(self, highest: int) -> int:
        """A step computes the active slots only, wherever they are."""
        return 1

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot to another."""
        key, value = self._sizes
        length = -(-length // 16) * 16  # whole tiles
        for cache, size in ((self._keys, key), (self._values, value)):
            cache[:, target, :, : length * size] = cache[:, source, :, : length * size]

    def prefill(self, weights: CpuWeights, chunks: Sequence[Chunk]) -> None:
        """Write the keys and values of chunks; short ones go through the model together."""
        self._run(weights, chunks, None)

    def logits(self, weights: CpuWeights, chunk: Chunk) -> Tensor:
        """As `prefill` of one chunk; returns (len(ids), V) logits in fp32."""
        logits = torch.empty(len(chunk.ids), self._stride)
        self._run(weights, [chunk], logits)
        return logits[:, : self._vocab_size]

    def step(
        self, weights: CpuWeights, slots: np.ndarray, ids: np.ndarray, positions: np.ndarray,
        lengths: np.ndarray, generated: np.ndarray,
    ) -> list[np.ndarray]:  # fmt: skip
        """One token for each row, as `TorchBackend.step`."""
        rows = len(slots)
        for row, values in zip(self._inputs, (ids, slots, positions), strict=True):
            row[:rows] = values
        shared = bool((slots[1:] == slots[:-1]).any())
        self._forward(weights, rows, self._logits, self._draws, shared)
        return [self._tokens[:rows], self._logprobs[:rows], self._top_ids[:rows]]

    def _run(self, weights: CpuWeights, chunks: Sequence[Chunk], logits: Tensor | None) -> None:
        """Run all tokens of chunks, `PREFILL` at a time."""
        counts = [len(chunk.ids) for chunk in chunks]
        every = np.stack(
            [
                np.concatenate([chunk.ids for chunk in chunks]),
                np.repeat([chunk.slot for chunk in chunks], counts),
                np.concatenate([np.arange(len(chunk.ids)) + chunk.start for chunk in chunks]),
            ]
        )
        for at in range(0, every.shape[1], PREFILL):
            part = every[:, at : at + PREFILL]
            rows = part.shape[1]
            self._inputs[:, :rows] = part
            self._forward(weights, rows, None if logits is None else logits[at:], None, shared=True)

    def _forward(
        self, weights: CpuWeights, count: int, logits: Tensor | None, draws: Any, shared: bool
    ) -> None:
        """Run the first ``count`` columns of the inputs: token ids, slots, positions."""
        if self._scratch is None:
            size = self._library.scratch_bytes(
                weights.model, self.rows_at_once, self._cache.context, self.threads
            )
            self._scratch = kernels.buffer(size)
        rows = kernels.Rows(count, *self._addresses, kernels.pointer(logits), self._stride, shared)
        self._library.forward(
            weights.model, self._cache, rows, self._scratch.data_ptr(), self.threads, draws,
            *self._outputs, MAX_LOGPROBS,
        )  # fmt: skip
