"""The model against transformers' GPT-2 and GPT-1, and what it promises about its parameters."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from gpt_dist.config.settings import ModelConfig
from gpt_dist.data.loader import IGNORE
from gpt_dist.model.gpt import GPT
from gpt_dist.model.layers import Dropout

ARCHITECTURES = pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 16, "vocab_size": 61}


def make(seed: int = 0, **settings: Any) -> GPT:
    """A model whose biases and norms are random too: their defaults would hide mistakes."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**{**TINY, **settings}))
    for parameter in model.parameters():
        if parameter.dim() < 2:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def copy_to_transformers(model: GPT, other: torch.nn.Module) -> None:
    """Weights by name, written for this test: transformers' Conv1D holds (in, out) matrices."""
    own = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        short = name.removeprefix("transformer.")
        short = short.replace("tokens_embed", "wte").replace("positions_embed", "wpe")
        with torch.no_grad():
            if short not in own:
                # transformers always has biases; without ours they must not matter.
                assert short.endswith("bias"), name
                parameter.zero_()
                continue
            value = own.pop(short)
            if short in ("wte.weight", "lm_head.weight"):
                value = value[: model.vocab_size]
            is_conv1d = short.startswith("h.") and value.dim() == 2
            parameter.copy_(value.t() if is_conv1d else value)
    assert not own


def compare(model: GPT, other: torch.nn.Module, ids: torch.Tensor, tolerance: float) -> None:
    copy_to_transformers(model, other)
    with torch.no_grad():
        expected = other.eval()(ids).logits
        actual = model.eval()(ids)
        losses = model(ids[:, :-1], ids[:, 1:])
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) < tolerance
    wanted = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert float(losses) == pytest.approx(float(wanted), rel=1e-5)


def gpt2(model: GPT) -> transformers.GPT2LMHeadModel:
    config = model.config
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=config.context_length,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=config.mlp_hidden,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_embeddings": tie, "bias": bias, "qkv_bias": qkv_bias, "mlp_hidden": hidden}
        for tie, (bias, qkv_bias), hidden in itertools.product(
            [True, False],
            [(True, None), (True, False), (False, None), (False, True)],
            [None, 48],
        )
    ],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()),
)
def test_logits_equal_transformers_gpt2(settings: dict[str, Any]) -> None:
    model = make(**settings)
    compare(model, gpt2(model), torch.randint(61, (3, 16)), 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_post_norm_is_openai_gpt(bias: bool) -> None:
    model = make(norm="post", bias=bias)
    other = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(
            vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=2, afn="gelu"
        )
    )
    compare(model, other, torch.randint(61, (3, 16)), 1e-5)


@pytest.mark.slow
def test_gpt2_124m_equals_transformers() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=50257))
    assert model.num_parameters() == 124_439_808
    compare(model, gpt2(model), torch.randint(50257, (1, 48)), 1e-4)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [  # transformers' own count of each published model
        ({"n_layer": 24, "n_head": 16, "n_embd": 1024}, 354_823_168),
        ({"n_layer": 36, "n_head": 20, "n_embd": 1280}, 774_030_080),
        ({"n_layer": 48, "n_head": 25, "n_embd": 1600}, 1_557_611_200),
    ],
)
def test_parameter_counts(shape: dict[str, int], parameters: int) -> None:
    with torch.device("meta"):
        assert GPT(ModelConfig(**shape, vocab_size=50257)).num_parameters() == parameters


def test_flops_follow_palm() -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig(vocab_size=50257))
    matrices = 124_439_808 - 1024 * 768
    assert model.flops_per_token() == 6 * matrices + 12 * 12 * 12 * 64 * 1024


@ARCHITECTURES
@pytest.mark.parametrize("tie", [True, False])
def test_padding_stays_zero_through_training(tie: bool, architecture: str) -> None:
    model = make(tie_embeddings=tie, architecture=architecture).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        ids = torch.randint(61, (4, 16))
        model(ids, ids.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    matrices = [model.wte.weight] if tie else [model.wte.weight, model.head_weight]
    for matrix in matrices:
        assert matrix.shape == (128, 32)
        assert torch.count_nonzero(matrix[61:]) == 0
        assert torch.count_nonzero(matrix[:61]) == 61 * 32
    assert model(ids).shape == (4, 16, 61)


@ARCHITECTURES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(dropout: float, architecture: str) -> None:
    ids, targets = torch.randint(61, (2, 3, 16))
    results = []
    for checkpointing in (False, True):
        model = make(
            activation_checkpointing=checkpointing, dropout=dropout, architecture=architecture
        ).train()
        torch.manual_seed(1)
        loss = model(ids, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=6, n_head=4, n_embd=256, context_length=128, vocab_size=1000))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert torch.all(parameter == (1 if name.endswith("weight") else 0)), name
            continue
        scale = math.sqrt(2 * 6) if name.endswith("c_proj.weight") else 1
        values = parameter.detach()[:1000]
        # The standard deviation of n normal numbers is known to 1 / sqrt(2 n).
        assert float(values.std()) == pytest.approx(
            0.02 / scale, rel=5 / math.sqrt(2 * values.numel())
        ), name
        assert abs(float(values.mean())) < 5 * 0.02 / math.sqrt(values.numel()), name
    ids = torch.randint(1000, (8, 128))
    loss = float(model(ids, torch.randint(1000, (8, 128))).detach()) / ids.numel()
    assert loss == pytest.approx(math.log(1000), abs=0.1)


def test_no_layers_is_a_bigram_model() -> None:
    """A token's logits depend on that token alone: no positions, no norm, no neighbours."""
    model = make(n_layer=0, tie_embeddings=False).eval()
    assert sorted(n for n, _ in model.named_parameters()) == ["lm_head.weight", "wte.weight"]
    ids = torch.randint(61, (2, 16))
    assert model.lm_head is not None
    table = (model.wte.weight @ model.lm_head.weight.t())[:61, :61]
    torch.testing.assert_close(model(ids), table[ids])


@ARCHITECTURES
def test_targets_that_are_ignored_do_not_count(architecture: str) -> None:
    model = make(architecture=architecture)
    ids, targets = torch.randint(61, (2, 3, 16))
    masked = targets.clone()
    masked[:, 8:] = IGNORE
    whole = model(ids[:, :8], targets[:, :8])
    torch.testing.assert_close(model(ids, masked), whole)


@ARCHITECTURES
def test_no_position_sees_the_future(architecture: str) -> None:
    model = make(architecture=architecture).eval()
    ids = torch.randint(61, (1, 16))
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 61
    torch.testing.assert_close(model(ids)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(ids)[:, 10:], model(changed)[:, 10:])


@ARCHITECTURES
def test_dropout_acts_in_training_only(architecture: str) -> None:
    model = make(dropout=0.5, architecture=architecture)
    # On the embeddings, and on both branches of each block; attention has its own.
    assert sum(isinstance(module, Dropout) for module in model.modules()) == 1 + 2 * 2
    ids = torch.randint(61, (2, 16))
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))
    torch.testing.assert_close(model(ids), make(architecture=architecture).eval()(ids))


def test_too_long_an_input_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens do not fit the context of 16"):
        make()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.slow
def test_models_without_initial_weights_are_quick_to_make() -> None:
    """They have the shapes of a real one, and torch's compiler, which takes seconds, stays out."""
    code = (
        "import sys; from gpt_dist.config.settings import ModelConfig;"
        "from gpt_dist.model.empty import empty_model, meta_model;"
        "from gpt_dist.model.gpt import GPT;"
        "config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=8, vocab_size=300);"
        "models = meta_model(config), empty_model(config);"
        "print('torch._dynamo' in sys.modules, 'sympy' in sys.modules,"
        "[next(model.parameters()).device.type for model in models],"
        "all(model.shapes == GPT(config).shapes for model in models))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False ['meta', 'cpu'] True\n", done.stderr


def test_a_bf16_residual_stream() -> None:
    """Blocks add in bf16, the loss stays close, and what is not autocast stays fp32."""
    losses = {}
    for low in (False, True):
        torch.manual_seed(0)
        model = GPT(ModelConfig(n_layer=3, n_head=2, n_embd=32, context_length=16, vocab_size=40))
        model.low_residual = low
        kinds: list[torch.dtype] = []
        model.h[2].register_forward_hook(lambda *call, kinds=kinds: kinds.append(call[2].dtype))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(40, (4, 17), generator=torch.Generator().manual_seed(1))
        found = []
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids[:, :-1], ids[:, 1:]) / 64
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert set(kinds) == {torch.bfloat16 if low else torch.float32}
        assert found[-1] < 0.9 * found[0]
        losses[low] = found
        assert model.hidden(ids[:, :-1]).dtype == kinds.pop() == torch.float32
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)
