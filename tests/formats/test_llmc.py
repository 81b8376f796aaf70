"""llm.c's weight files: read what its own script writes, and write the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gpt_dist import export, import_hf
from gpt_dist.checkpoints.reader import load_model, load_weights
from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.formats.llmc import read_llmc, to_llmc
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import CharTokenizer
from tests.components import require_module

transformers = require_module("transformers")
VOCAB, WIDTH, LAYERS, CONTEXT = 100, 32, 3, 24


def reference(version: int) -> tuple[bytes, torch.nn.Module]:
    """A transformers model and its weight file, built tensor by tensor in llm.c's order."""
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=4
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
            if version == 5:
                parameter.copy_(parameter.bfloat16())
    body = model.transformer
    wte = torch.zeros(128, WIDTH)  # 100 tokens padded to a multiple of 128
    wte[:VOCAB] = body.wte.weight
    tensors = [wte, body.wpe.weight]
    for path in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            for block in body.h:
                tensor = getattr(block.get_submodule(path), kind)
                # Conv1D keeps (in, out); llm.c's linear layers are (out, in).
                tensors.append(tensor.t() if tensor.dim() == 2 else tensor)
    tensors += [body.ln_f.weight, body.ln_f.bias]
    header = np.zeros(256, dtype="<i4")
    header[:8] = [20240326, version, CONTEXT, VOCAB, LAYERS, 4, WIDTH, 128]
    flat = np.concatenate([t.detach().numpy().ravel() for t in tensors]).astype("<f4")
    if version == 5:  # the upper half of each float
        return header.tobytes() + (flat.view("<u4") >> 16).astype("<u2").tobytes(), model
    return header.tobytes() + flat.tobytes(), model


@pytest.mark.parametrize(("version", "dtype"), [(3, "fp32"), (5, "bf16")])
def test_round_trip(tmp_path: Path, version: int, dtype: str) -> None:
    data, theirs = reference(version)
    source = tmp_path / "gpt2.bin"
    source.write_bytes(data)
    tokenizer = CharTokenizer(map(chr, range(200, 200 + VOCAB)))
    tokenizer.save(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    options = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(checkpoint)]
    import_hf.main([str(source), *options])
    model, _, _ = load_model(checkpoint)
    ids = torch.randint(VOCAB, (2, CONTEXT))
    with torch.no_grad():
        assert float((model(ids) - theirs(ids).logits).abs().max()) < 1e-4
    out = tmp_path / "out.bin"
    options = ["--format", "llmc", "--dtype", dtype, "--out", str(out)]
    export.main(["--checkpoint", str(checkpoint), *options])
    assert out.read_bytes() == data


def test_absent_biases_are_zeros(tmp_path: Path) -> None:
    torch.manual_seed(5)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 8, "vocab_size": 30}
    model = GPT(ModelConfig(**shape, bias=False)).eval()  # type: ignore[arg-type]
    path = tmp_path / "model.bin"
    path.write_bytes(b"".join(to_llmc(model, torch.float32)))
    config, tensors = read_llmc(path)
    again = GPT(config).eval()
    load_weights(again, tensors, path)
    ids = torch.randint(30, (2, 8))
    with torch.no_grad():
        assert torch.equal(model(ids), again(ids))
    assert config.bias
    assert not any(p.any() for name, p in again.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 0}, "unsupported by llm.c: .* bigram"),
        ({"norm": "post"}, "pre-LN"),
        ({"architecture": "nanochat"}, "architecture = nanochat"),
        ({"tie_embeddings": False}, "shares the embedding"),
        ({"mlp_hidden": 20}, "mlp_hidden = 20"),
    ],
)
def test_models_that_llmc_does_not_support(settings: dict[str, object], message: str) -> None:
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 8, "vocab_size": 30}
    model = GPT(ModelConfig.model_validate(shape | settings))
    with pytest.raises(UsageError, match=message):
        to_llmc(model, torch.float32)
    with pytest.raises(UsageError, match="fp32 or bf16"):
        to_llmc(model, torch.float16)


def damaged(index: int, value: int) -> bytes:
    data = bytearray(reference(3)[0])
    data[4 * index : 4 * index + 4] = value.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("change", "length", "kind", "message"),
    [
        ((0, 7), None, UsageError, "not an llm.c weight file"),
        ((1, 4), None, GptDistError, "version 4; valid are 3"),
        ((4, 4), None, GptDistError, "its header says"),
        ((5, 5), None, GptDistError, "its header is invalid"),
        (None, -10, GptDistError, "truncated"),
        (None, 500, GptDistError, "not an llm.c weight file"),
        (None, None, UsageError, "name its tokenizer with --tokenizer"),
    ],
    ids=["magic", "version", "layers", "heads", "tail", "header", "tokenizer"],
)
def test_broken_files(
    tmp_path: Path,
    change: tuple[int, int] | None,
    length: int | None,
    kind: type[GptDistError],
    message: str,
) -> None:
    source = tmp_path / "broken.bin"
    data = damaged(*change) if change else reference(3)[0]
    source.write_bytes(data[:length])
    with pytest.raises(kind, match=message) as caught:
        import_hf.main([str(source), "--out", str(tmp_path / "checkpoint")])
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.bin"]


def test_huge_counts_are_refused_before_a_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's size disproves its header; a model of two billion layers is never begun."""
    source = tmp_path / "huge.bin"
    source.write_bytes(damaged(4, 2_000_000_000))

    def build(*_: object) -> None:
        raise AssertionError("built a model from an unchecked header")

    monkeypatch.setattr(GPT, "__init__", build)
    with pytest.raises(GptDistError, match="its header says 1"):
        read_llmc(source)
