"""The decoder's arithmetic in plain PyTorch, on any device.

A step always runs over slots 0 to n - 1 with n rounded up, whether all of them are in use or not,
so that there are few shapes and the cache is read in place. A row that is not in use writes its
keys and values where its slot's next token will overwrite them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_dist import ops
from gpt_dist.config.settings import ModelConfig
from gpt_dist.inference.results import PREFILL, Chunk
from gpt_dist.inference.sampling import Plan, Sampler, SamplingParams
from gpt_dist.model.gpt import GPT, Block
from gpt_dist.ops import decode


class Linear:
    """A linear layer whose weights are held in the compute dtype, or in int8 with a scale a row."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str, device: Any) -> None:
        wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
        self.compute = wanted
        self.scale: Tensor | None = None
        weight = weight.detach().to(device, torch.float32)
        if dtype == "int8":
            self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
            weight = (weight / self.scale[:, None]).round_()
            wanted = torch.int8
        self.weight = weight.to(wanted, copy=True)
        self.bias = None if bias is None else bias.detach().to(device, torch.float32, copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) in fp32 to (..., out) in fp32."""
        y = F.linear(x.to(self.compute), self.weight.to(self.compute)).float()
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias


class Norm:
    """A layer norm in fp32."""

    def __init__(self, module: Any, device: Any) -> None:
        self.weight = module.weight.detach().to(device, torch.float32, copy=True)
        bias = module.bias
        self.bias = None if bias is None else bias.detach().to(device, torch.float32, copy=True)
        self.eps = module.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(
        self, stream: Tensor, branch: Tensor | None, dtype: torch.dtype, keep: bool = False
    ) -> Tensor:
        """`gpt_dist.ops.decode.add_norm` with this norm."""
        return decode.add_norm(
            stream, branch, self.weight, self.bias, self.eps, rms=False, keep=keep, dtype=dtype
        )


class RMSNorm:
    """An RMSNorm without weights, in fp32."""

    def __init__(self, module: Any, device: Any) -> None:
        self.eps = module.eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.eps)

    def add(
        self, stream: Tensor, branch: Tensor | None, dtype: torch.dtype, keep: bool = False
    ) -> Tensor:
        """`gpt_dist.ops.decode.add_norm` with this norm."""
        return decode.add_norm(
            stream, branch, None, None, self.eps, rms=True, keep=keep, dtype=dtype
        )


NORMS: dict[str, type[Norm] | type[RMSNorm]] = {
    "layer": Norm,
    "rms": RMSNorm,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": ops.gelu, "relu2": ops.relu2}


class Layer:
    """The weights of one block."""

    def __init__(
        self, block: Block, config: ModelConfig, dtype: str, device: Any, kind: type[Linear]
    ) -> None:
        def linear(module: Any) -> Linear:
            return kind(module.weight, module.bias, dtype, device)

        norm = NORMS[config.parts.norm]
        self.pre_norm = block.pre_norm
        self.activation = ACTIVATIONS[config.parts.activation]
        self.ln_1, self.ln_2 = norm(block.ln_1, device), norm(block.ln_2, device)
        self.qkv, self.mix = linear(block.attn.c_attn), linear(block.attn.c_proj)
        self.up, self.down = linear(block.mlp.c_fc), linear(block.mlp.c_proj)

    def __call__(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        def mlp(x: Tensor) -> Tensor:
            return self.down(self.activation(self.up(x)))

        if self.pre_norm:
            x = x + self.mix(attend(self.qkv(self.ln_1(x))))
            return x + mlp(self.ln_2(x))
        x = self.ln_1(x + self.mix(attend(self.qkv(x))))
        return self.ln_2(x + mlp(x))


@dataclass
class TorchWeights:
    """One set of weights, a copy."""

    embedding: Tensor
    first: Norm | RMSNorm | None
    """Norm of the embedding."""
    positions: Tensor | None
    layers: list[Layer]
    final: Norm | RMSNorm | None
    """Norm before the head."""
    head: Linear
    graphs: dict[int, Any] = field(default_factory=dict)
    """CUDA graphs of a step, by its number of rows."""


class TorchBackend:
    """KV cache, forward passes and sampling on one device.

    Args:
        model: gives the shape.
        slots: rows of the cache.
        context: positions of a slot.
        device: where to run.
        dtype: "fp32", "bf16" or "int8" (weights only).
        deterministic: always the same shapes, whatever the number of active slots.
    """

    name = "pytorch"
    linear = Linear
    rows_at_once = 0  # the result of a row would depend on the guesses beside it

    def __init__(
        self, model: GPT, slots: int, context: int, device: torch.device, dtype: str,
        deterministic: bool,
    ) -> None:  # fmt: skip
        config = model.config
        self.parts = config.parts
        self.slots, self.context, self.device = slots, context, device
        self.dtype, self.deterministic = dtype, deterministic
        self.n_head, self.n_kv_head = config.n_head, config.kv_heads
        self.head_size = config.head_size
        self.turns: Tensor | None = None
        """Rotation of every position."""
        if self.parts.positions == "rotary":
            every = torch.arange(context + 1, device=device)  # also that of a full, idle slot
            self.turns = ops.rotations(every, self.head_size, self.parts.rotary_base)
        self.sampler = Sampler(slots, model.vocab_size, device)
        # On CPU, attention with a single query is many times slower in bf16 than in fp32.
        wide = dtype == "fp32" or device.type == "cpu"
        # One more position than a full slot has: idle rows write there.
        self.cache = torch.zeros(
            (config.n_layer, 2, slots, config.kv_heads, context + 1, self.head_size),
            dtype=torch.float32 if wide else torch.bfloat16,
            device=device,
        )
        self.cache_bytes = self.cache.nbytes
        # Rows: token ids, positions, tokens generated, active; uploaded once a step.
        self.inputs = torch.zeros(4, slots, dtype=torch.int64, device=device)
        # Tokens of each slot's sequence that stood before those in the cache.
        self.dropped = torch.zeros(slots, dtype=torch.int64, device=device)
        self.staging = torch.zeros(4, slots, dtype=torch.int64, pin_memory=device.type == "cuda")

    @torch.inference_mode()
    def load(self, model: GPT) -> TorchWeights:
        """Copy the weights of ``model`` in this decoder's dtype."""
        device, config = self.device, model.config
        norm = NORMS[config.parts.norm]
        final = norm(model.ln_f, device) if config.n_layer and config.norm == "pre" else None
        wpe = model.wpe.weight.detach() if model.wpe else None
        return TorchWeights(
            embedding=model.wte.weight.detach().to(device, torch.float32, copy=True),
            first=norm(model.ln_e, device) if config.parts.norm_embedding else None,
            positions=None if wpe is None else wpe.to(device, torch.float32, copy=True),
            layers=[
                Layer(block, config, self.dtype, device, self.linear)  # type: ignore[arg-type]
                for block in model.h
            ],
            final=final,
            head=self.linear(model.head_weight, None, self.dtype, device),
        )

    def set(
        self,
        slot: int,
        params: SamplingParams,
        ids: Sequence[int] | np.ndarray,
        generated: int = 0,
    ) -> None:
        """Give a slot its sampling parameters; as `Sampler.set`."""
        self.sampler.set(slot, params, ids, generated)
        self.dropped[slot] = 0

    def slide(self, slot: int, dropped: int) -> None:
        """Note that the slot's sequence has ``dropped`` more tokens than its cache holds."""
        self.dropped[slot] += dropped

    def rows(self, highest: int) -> int:
        """Rows that a step computes if ``highest`` is the highest active slot."""
        return self.slots if self.deterministic else min(_power(highest + 1, 1), self.slots)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot to another."""
        self.cache[:, :, target, :, :length] = self.cache[:, :, source, :, :length]

    @torch.inference_mode()
    def prefill(self, weights: TorchWeights, chunks: Sequence[Chunk]) -> None:
        """Write the keys and values of chunks, in this order."""
        if weights.layers:
            for chunk in chunks:
                for at in range(0, len(chunk.ids), PREFILL):
                    self._chunk(weights, chunk, at)

    @torch.inference_mode()
    def logits(self, weights: TorchWeights, chunk: Chunk) -> Tensor:
        """As `prefill` of one chunk; returns (len(ids), V) logits in fp32."""
        parts = [
            self._head(weights, self._chunk(weights, chunk, at))
            for at in range(0, len(chunk.ids), PREFILL)
        ]
        return torch.cat(parts)[:, : self.sampler.vocab_size]

    @torch.inference_mode()
    def step(
        self, weights: TorchWeights, slots: np.ndarray, ids: np.ndarray, positions: np.ndarray,
        lengths: np.ndarray, generated: np.ndarray,
    ) -> list[np.ndarray]:  # fmt: skip
        """One token for each row; a row is an active slot.

        Backends with ``rows_at_once`` verify guesses too: their rows follow that of the slot's
        last token, and their tokens are -1 from the first wrong guess on.

        Args:
            weights: what to run.
            slots: (R,) slot of each row.
            ids: (R,) token of each row.
            positions: (R,) its position, where its keys and values go.
            lengths: (slots,) tokens in the cache of every slot, active or not.
            generated: (slots,) tokens generated before.

        Returns:
            tokens (R,), and where a slot asks for log-probabilities those (R, 1 + N) and the ids
            (R, N) of the N most likely tokens.
        """
        self.staging[1], self.staging[2] = torch.from_numpy(lengths), torch.from_numpy(generated)
        self.staging[3] = 0
        active = torch.from_numpy(slots)
        self.staging[0, active] = torch.from_numpy(ids)
        self.staging[3, active] = 1
        self.inputs.copy_(self.staging, non_blocking=True)
        plan = self.sampler.plan(slots.tolist())
        rows, length = self.rows(int(slots.max())), self.context
        if not self.deterministic:
            length = min(_power(int(positions.max()) + 1, 64), self.context)
        outputs = self._step(weights, rows, length, plan)
        # The only synchronisation: doubles hold token ids and fp32 exactly.
        host = torch.cat([part.double().view(rows, -1) for part in outputs], 1).cpu().numpy()
        host = host[slots]
        if len(outputs) == 1:
            return [host[:, 0].astype(np.int64)]
        top = outputs[2].shape[1]
        return [
            host[:, 0].astype(np.int64), host[:, 1 : 2 + top], host[:, 2 + top :].astype(np.int64)
        ]  # fmt: skip

    def _step(
        self, weights: TorchWeights, rows: int, length: int, plan: Plan
    ) -> tuple[Tensor, ...]:
        ids, positions, generated, active = (row[:rows] for row in self.inputs)
        slots = torch.arange(rows, device=self.device)
        keys = torch.arange(length, device=self.device)
        mask = (keys[None, :] <= positions[:, None])[:, None, None, :]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            query, key, value = self._heads(qkv, positions)  # each (rows, heads, head size)
            cache = self.cache[layer]
            cache[0].index_put_((slots, heads, positions_), key)
            cache[1].index_put_((slots, heads, positions_), value)
            mixed = F.scaled_dot_product_attention(
                query[:, :, None],
                cache[0, :rows, :, :length],
                cache[1, :rows, :, :length],
                mask,
                enable_gqa=self.n_kv_head != self.n_head,
            )
            return mixed.flatten(1).float()

        slots, positions_ = slots[:, None], positions[:, None]
        heads = torch.arange(self.n_kv_head, device=self.device)[None, :]
        x = self._layers(weights, ids, positions, attend)
        index = positions + self.dropped[:rows] + 1  # in the sequence, of the token to choose
        return self.sampler.sample(self._head(weights, x), plan, index, generated, active)

    def _chunk(self, weights: TorchWeights, chunk: Chunk, at: int) -> Tensor:
        """Final activations (n, C) of a chunk's tokens from ``at`` on, at most `PREFILL`."""
        slot, ids, start = chunk.slot, chunk.ids[at : at + PREFILL], chunk.start + at
        used, end = len(ids), self._keys(start + len(ids))
        if self.deterministic:  # one shape for all chunks, on the positions that exist
            padded = np.zeros(PREFILL, np.int64)
            padded[:used] = ids
            ids, end = padded, self.context
        tokens = torch.from_numpy(np.asarray(ids, np.int64))
        if self.device.type == "cuda":
            tokens = tokens.pin_memory()
        tokens = tokens.to(self.device, non_blocking=True)
        places = (torch.arange(len(ids), device=self.device) + start).clamp(max=self.context - 1)
        mask = torch.arange(end, device=self.device)[None, :] <= places[:, None]

        def attend(layer: int, qkv: Tensor) -> Tensor:
            query, key, value = (part.transpose(0, 1) for part in self._heads(qkv, places))
            cache = self.cache[layer, :, slot]
            cache[0, :, start : start + used] = key[:, :used]
            cache[1, :, start : start + used] = value[:, :used]
            mixed = F.scaled_dot_product_attention(
                query[None],
                cache[0, None, :, :end],
                cache[1, None, :, :end],
                mask,
                enable_gqa=self.n_kv_head != self.n_head,
            )
            return mixed[0].transpose(0, 1).flatten(1).float()

        return self._layers(weights, tokens, places, attend)[:used]

    def _keys(self, end: int) -> int:
        """Keys that a chunk which ends there looks at; those beyond are masked."""
        return end

    def _turned(self, qkv: Tensor, positions: Tensor) -> Tensor:
        """Queries, keys and values that know their positions."""
        if self.turns is None:
            return qkv
        return ops.rotary(qkv, self.turns[positions], self.n_head, self.n_kv_head, self.parts.eps)

    def _heads(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (rows, heads, head size) of rows at some positions."""
        qkv = self._turned(qkv, positions)
        shaped = qkv.view(len(qkv), -1, self.head_size).to(self.cache.dtype)
        found: tuple[Tensor, ...] = shaped.split(
            (self.n_head, self.n_kv_head, self.n_kv_head), dim=1
        )
        return found

    @staticmethod
    def _embed(weights: TorchWeights, ids: Tensor, positions: Tensor) -> Tensor:
        """The stream before the first block (n, C), fp32."""
        x = weights.embedding[ids]
        if weights.first is not None:
            x = weights.first(x)
        if weights.positions is not None:
            x = x + weights.positions[positions.clamp(max=len(weights.positions) - 1)]
        return x

    def _layers(
        self, weights: TorchWeights, ids: Tensor, positions: Tensor,
        attend: Callable[[int, Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        x = self._embed(weights, ids, positions)
        for index, layer in enumerate(weights.layers):
            x = layer(x, partial(attend, index))
        return x if weights.final is None else weights.final(x)

    def _head(self, weights: TorchWeights, x: Tensor) -> Tensor:
        return ops.soft_cap(weights.head(x), self.parts.soft_cap)


def _power(count: int, least: int) -> int:
    """The next power of two, at least ``least``."""
    return max(least, 1 << (count - 1).bit_length())
