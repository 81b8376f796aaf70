"""How transformers describes and stores each of our models: one layout for each ``model_type``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from gpt_dist.config.architectures import ARCHITECTURES
from gpt_dist.config.conflicts import architecture_problems
from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import UsageError


class Piece(NamedTuple):
    """Consecutive rows of one of our parameters, as a tensor of theirs."""

    name: str
    rows: int | None
    """How many; None: all of them."""
    transposed: bool = False
    """Whether they store (in, out), as Hugging Face's Conv1D does."""


class Layout(ABC):
    """A ``model_type`` of transformers."""

    model_type: str
    model_class: str
    settings: Mapping[str, Any]
    """Settings that every such model has."""
    sizes: Mapping[str, str]
    """Our setting → their key."""
    missing: Mapping[str, Any]
    """Their key → its value where ``config.json`` leaves it out, as transformers' class has it."""
    names: Mapping[str, str]
    """Our name within the model or a block, less ``.weight`` and ``.bias`` → theirs."""
    prefix: str
    """Before the names of all tensors but the head."""
    block: str
    """Before the number of a block."""

    @abstractmethod
    def to_config(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of ``config.json`` that are neither sizes nor common to all layouts.

        Raises:
            UsageError: transformers has no such model.
        """

    @abstractmethod
    def variant(self, data: dict[str, Any]) -> list[tuple[bool, str]]:
        """What makes a model another one than ours: (whether it is so, what it is)."""

    def filled(self, config: ModelConfig) -> ModelConfig:
        """The model with the parameters that every stored one has."""
        return config

    def from_config(self, data: dict[str, Any], where: str | Path) -> ModelConfig:
        """Our configuration for the contents of a ``config.json``.

        Raises:
            UsageError: it computes something else, or its sizes are not valid.
        """
        for wrong, what in self.variant(data):
            if wrong:
                raise UsageError(
                    f"{where}: {what}: this variant of {self.model_type} is not supported"
                )
        given = {ours: data.get(key, self.missing.get(key)) for ours, key in self.sizes.items()}
        try:
            config = ModelConfig.model_validate({**self.settings, **given})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UsageError(
                f"{where}: {key} = {first['input']!r}: {first['msg'].lower()}"
            ) from None
        if not config.n_layer or config.n_embd % config.n_head or architecture_problems(config):
            raise UsageError(
                f"{where}: n_layer {config.n_layer}, n_head {config.n_head}, n_kv_head "
                f"{config.kv_heads}, n_embd {config.n_embd}: not a {self.model_type} "
                "(n_layer >= 1, n_kv_head divides n_head, n_head divides n_embd; "
                "rotated heads have an even size)"
            )
        return config

    def pieces(self, config: ModelConfig, name: str) -> list[Piece]:
        """The tensors that hold a parameter, in the order of its rows."""
        if name == "lm_head.weight":
            return [Piece(name, None)]
        if not name.startswith("h."):
            stem, _, kind = name.rpartition(".")
            return [Piece(f"{self.prefix}{self.names.get(stem, stem)}.{kind}", None)]
        _, number, rest = name.split(".", 2)
        stem, _, kind = rest.rpartition(".")
        return self.in_block(config, f"{self.prefix}{self.block}.{number}.", stem, kind)

    def in_block(self, config: ModelConfig, start: str, stem: str, kind: str) -> list[Piece]:
        """The same for a parameter ``stem.kind`` of a block whose names begin with ``start``."""
        return [Piece(f"{start}{self.names.get(stem, stem)}.{kind}", None)]


class Gpt2(Layout):
    """Pre-LN. Matrices are (in, out), and there are all biases."""

    model_type = "gpt2"
    model_class = "GPT2LMHeadModel"
    settings: Mapping[str, Any] = {"norm": "pre"}
    sizes: Mapping[str, str] = {
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "mlp_hidden": "n_inner",
        "context_length": "n_positions",
        "vocab_size": "vocab_size",
        "dropout": "resid_pdrop",
        "tie_embeddings": "tie_word_embeddings",
    }
    missing: Mapping[str, Any] = {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "n_positions": 1024,
        "vocab_size": 50257,
        "resid_pdrop": 0.1,
        "tie_word_embeddings": True,
    }
    names: Mapping[str, str] = {}
    prefix = "transformer."
    block = "h"
    conv1d = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    activation = "activation_function"
    activations: Mapping[str, str] = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}

    def to_config(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "n_positions": config.context_length,
            "n_ctx": config.context_length,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "layer_norm_epsilon": config.parts.eps,
        } | self.own_keys(config)

    def own_keys(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "activation_function": "gelu_new",
            "n_inner": config.hidden,
            "scale_attn_weights": True,
            "use_cache": True,
        }

    def variant(self, data: dict[str, Any]) -> list[tuple[bool, str]]:
        eps = ARCHITECTURES["gpt2"].eps
        activation = data.get(self.activation, next(iter(self.activations)))
        epsilon = data.get("layer_norm_epsilon", eps)
        return [
            (activation not in self.activations, f"activation {activation!r}"),
            (epsilon != eps, f"layer_norm_epsilon {epsilon}"),
            (data.get("scale_attn_weights", True) is not True, "scale_attn_weights false"),
            (bool(data.get("scale_attn_by_inverse_layer_idx")), "scale_attn_by_inverse_layer_idx"),
            (bool(data.get("add_cross_attention")), "add_cross_attention"),
            (bool(data.get("quantization_config")), "quantized weights"),
        ]

    def filled(self, config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"bias": True, "qkv_bias": True})

    def in_block(self, config: ModelConfig, start: str, stem: str, kind: str) -> list[Piece]:
        turned = kind == "weight" and stem in self.conv1d
        return [Piece(f"{start}{stem}.{kind}", None, turned)]


class Gpt1(Gpt2):
    """Post-LN, as GPT-1. Its MLP is always 4 * n_embd wide."""

    model_type = "openai-gpt"
    model_class = "OpenAIGPTLMHeadModel"
    settings: Mapping[str, Any] = {"norm": "post"}
    missing: Mapping[str, Any] = {**Gpt2.missing, "n_positions": 512, "vocab_size": 40478}
    names: Mapping[str, str] = {"wte": "tokens_embed", "wpe": "positions_embed"}
    activation = "afn"
    activations: Mapping[str, str] = {"gelu": "gelu"}  # what they call the tanh approximation

    def own_keys(self, config: ModelConfig) -> dict[str, Any]:
        if config.hidden != 4 * config.n_embd:
            raise UsageError(
                f"model.mlp_hidden = {config.hidden}: a model with model.norm = post is exported "
                f"as openai-gpt, whose MLP is always 4 * n_embd = {4 * config.n_embd} wide"
            )
        return {"afn": "gelu"}


class NanoChat(Layout):
    """Queries, keys and values are three matrices. There are no vectors."""

    model_type = "nanochat"
    model_class = "NanoChatForCausalLM"
    settings: Mapping[str, Any] = {"architecture": "nanochat"}
    sizes: Mapping[str, str] = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "n_embd": "hidden_size",
        "mlp_hidden": "intermediate_size",
        "context_length": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "dropout": "attention_dropout",
        "tie_embeddings": "tie_word_embeddings",
    }
    missing: Mapping[str, Any] = {
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "hidden_size": 768,
        "intermediate_size": 8192,
        "max_position_embeddings": 2048,
        "vocab_size": 50304,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    names: Mapping[str, str] = {
        "wte": "embed_tokens",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    prefix = "model."
    block = "layers"

    def to_config(self, config: ModelConfig) -> dict[str, Any]:
        parts = config.parts
        return {
            "hidden_size": config.n_embd,
            "intermediate_size": config.hidden,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.kv_heads,
            "max_position_embeddings": config.context_length,
            "hidden_act": parts.activation,
            "attention_dropout": config.dropout,
            "attention_bias": False,
            "rms_norm_eps": parts.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": parts.rotary_base},
            "final_logit_softcapping": parts.soft_cap,
            "use_cache": True,
        }

    def variant(self, data: dict[str, Any]) -> list[tuple[bool, str]]:
        parts = ARCHITECTURES["nanochat"]
        expected = {
            "hidden_act": parts.activation,
            "attention_bias": False,
            "rms_norm_eps": parts.eps,
            "final_logit_softcapping": parts.soft_cap,
            "rope_theta": parts.rotary_base,  # of transformers 4
            "rope_scaling": None,
        }
        found = [
            (data.get(key, value) != value, f"{key} {data.get(key)!r}")
            for key, value in expected.items()
        ]
        rope = data.get("rope_parameters") or {}
        plain = {"rope_type": "default", "rope_theta": parts.rotary_base}
        found.append((not isinstance(rope, dict) or plain | rope != plain, f"rotary {rope}"))
        found.append((bool(data.get("quantization_config")), "quantized weights"))
        return found

    def in_block(self, config: ModelConfig, start: str, stem: str, kind: str) -> list[Piece]:
        if stem != "attn.c_attn":
            return super().in_block(config, start, stem, kind)
        keys = config.kv_heads * config.head_size
        rows = {"q": config.n_embd, "k": keys, "v": keys}
        return [Piece(f"{start}self_attn.{name}_proj.{kind}", n) for name, n in rows.items()]


LAYOUTS: dict[str, Layout] = {layout.model_type: layout for layout in (Gpt2(), Gpt1(), NanoChat())}


def layout_of(config: ModelConfig) -> Layout:
    """The layout of a model."""
    return next(
        layout
        for layout in LAYOUTS.values()
        if all(getattr(config, key) == value for key, value in layout.settings.items())
        and layout.settings.get("architecture", "gpt2") == config.architecture
    )
