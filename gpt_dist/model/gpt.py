"""The language model; the same weights train and decode.

It is GPT-2 as OpenAI published it (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"): pre-LN blocks, tanh GELU, learned positions, output head tied to the token embedding.
``model.architecture`` replaces some of these parts by others (`gpt_dist.config.architectures`).
Parameter names are those of Hugging Face's GPT-2, without its ``transformer.`` prefix; matrices are
stored (out, in).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt_dist import ops
from gpt_dist.config.settings import ModelConfig
from gpt_dist.model.layers import ACTIVATIONS, Dropout, Embedding, Linear, Rotary, norm

PADDING = 128
"""The vocabulary is padded to a multiple of this, for speed. Padding rows stay zero."""

VOCAB_PARAMETERS = ("wte.weight", "lm_head.weight")
"""Parameters whose rows are tokens; files hold them without padding."""


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, rotary = config.n_embd, config.parts.positions == "rotary"
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.kv_heads, config.dropout
        self.c_attn = Linear(width, width + 2 * config.kv_heads * config.head_size, bias=qkv_bias)
        self.rotary = Rotary(config) if rotary else nn.Identity()
        self.c_proj = Linear(width, width, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        qkv = self.rotary(self.c_attn(x))
        mixed = ops.attention(qkv, self.n_head, dropout, self.n_kv_head)
        return cast(Tensor, self.resid_dropout(self.c_proj(mixed)))


class MLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        of_activation = ACTIVATIONS[config.parts.activation]
        self.c_fc = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.c_proj = of_activation(config.hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(self.c_proj(self.c_fc(x))))


class Block(nn.Module):
    """Attention and MLP, each around a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        # A post-norm's output is the residual stream, which stays fp32.
        self.ln_1 = norm(config, stream=not self.pre_norm)
        self.attn = Attention(config)
        self.ln_2 = norm(config, stream=not self.pre_norm)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = ops.add(x, self.attn(self.ln_1(x)))
            return ops.add(x, self.mlp(self.ln_2(x)))
        x = self.ln_1(x + self.attn(x))
        return cast(Tensor, self.ln_2(x + self.mlp(x)))


class GPT(nn.Module):
    """The language model.

    With ``n_layer`` 0 it is the bigram baseline: a token's embedding goes straight to the head,
    without positions and without layer norm.

    Args:
        config: the shape; ``vocab_size`` must be set by now.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: take it from the tokenizer")
        self.config = config
        self.vocab_size = config.vocab_size
        self.low_residual = False
        """Whether blocks add to their input in autocast's dtype (``train.residual``)."""
        padded = math.ceil(config.vocab_size / PADDING) * PADDING
        self.wte = Embedding(padded, config.n_embd)
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(config.n_embd, padded, bias=False)
        )
        parts, deep = config.parts, config.n_layer > 0
        self.ln_e = norm(config, stream=True) if parts.norm_embedding else nn.Identity()
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.wpe: nn.Embedding | None = None
        if deep and parts.positions == "learned":
            self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.drop = Dropout(config.dropout if deep else 0.0)
        # fp32 output: the loss scales its gradient, which would lose precision in bf16.
        final = deep and config.norm == "pre"
        self.ln_f = norm(config, stream=True) if final else nn.Identity()
        self.init_weights()
        # Kept, because under ZeRO-3 each rank holds only a part of every parameter.
        self.shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02); projections into the residual stream scaled by 1/sqrt(2 * n_layer), or 0."""
        config = self.config
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            scale = 1.0
            if name.endswith("c_proj.weight"):
                scale = 0.0 if config.zero_projections else 1 / math.sqrt(2 * config.n_layer)
            if name == "lm_head.weight" and config.zero_head:
                scale = 0.0
            nn.init.normal_(parameter, std=0.02 * scale)
            if name in VOCAB_PARAMETERS:
                parameter[self.vocab_size :] = 0

    @property
    def head_weight(self) -> Tensor:
        """(padded vocabulary, width) matrix of the output head."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, ids: Tensor) -> Tensor:
        """Final activations (B, T, C) for token ids (B, T)."""
        time = ids.shape[1]
        if time > self.config.context_length:
            raise ValueError(
                f"{time} tokens do not fit the context of {self.config.context_length}"
            )
        x = self.ln_e(self.wte(ids))
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(time, device=ids.device))
        x = self.drop(x)
        if self.low_residual and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.trunk(x)

    def trunk(self, x: Tensor) -> Tensor:
        """Embeddings (B, T, C) → final activations: all that can be compiled as one graph.

        The embedding is left out, because compiled its gradient is summed in any order on a GPU.
        """
        for block in self.h:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return cast(Tensor, self.ln_f(x))

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits, or the summed loss.

        Args:
            ids: (B, T) token ids, T at most ``context_length``.
            targets: (B, T) next tokens; a negative target is ignored.
            positions: (B, T) bool; without ``targets``, the positions to compute logits for.

        Returns:
            With ``targets`` the sum of the cross-entropies in nats, a scalar in fp32. Without
            them logits: (B, T, vocab_size), or (N, vocab_size) of the N chosen positions.
        """
        x, cap = self.hidden(ids), self.config.parts.soft_cap
        if targets is None:
            if positions is not None:
                x = x[positions]
            logits = F.linear(x, self.head_weight)[..., : self.vocab_size]
            return ops.soft_cap(logits, cap)
        return ops.linear_cross_entropy(
            x.flatten(0, 1), self.head_weight, targets.flatten(), self.vocab_size, cap
        )

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters without padding; ``embeddings=False`` also without those that are only looked
        up, never multiplied (for FLOPs): positions, and tokens unless they are the head too."""
        looked_up = {"wpe.weight"} if self.lm_head is None else {"wpe.weight", "wte.weight"}
        total = 0
        for name, shape in self.shapes.items():
            rows = self.vocab_size if name in VOCAB_PARAMETERS else shape[0]
            if embeddings or name not in looked_up:
                total += rows * math.prod(shape[1:])
        return total

    def flops_per_token(self, time: int | None = None) -> float:
        """Training FLOPs a token: 6N + 12LCT (PaLM, arXiv:2204.02311, appendix B)."""
        config = self.config
        attention = 12 * config.n_layer * config.n_embd * (time or config.context_length)
        return 6 * self.num_parameters(embeddings=False) + attention
