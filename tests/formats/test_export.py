"""Export and import, against the real transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt_dist import export, import_hf
from gpt_dist.checkpoints.reader import load_model
from gpt_dist.checkpoints.writer import write_checkpoint
from gpt_dist.config.settings import Config, ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.formats.hf import from_hf_config
from gpt_dist.formats.hf_tokenizers import tokenizer_files
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import BpeTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from tests.components import require_module

transformers = require_module("transformers")
transformers.utils.logging.set_verbosity_error()

TEXT = (
    Path(__file__).read_text(encoding="utf-8")
    + "\nNaïve façade, “quotes”, Ελληνικά, Русский, 日本語のテキスト, 🙂🙃 e\u0301\t\r\n  \n\n"
    + "It's we'll I'M 12345 3.14 don't   stop\u00a0now "
)


GPT2 = pytest.param("gpt2", marks=pytest.mark.slow)
"""Its 50,257 tokens take seconds to write and to compare."""


@pytest.fixture(scope="module", params=[GPT2, "char", "char-eot", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(request.param)


def make_tokenizer(kind: str) -> Tokenizer:
    match kind:
        case "gpt2":
            return load_tokenizer("gpt2")
        case "bpe":
            return BpeTokenizer.train([TEXT], vocab_size=400)
    return CharTokenizer(TEXT, eot=kind == "char-eot")


def make_model(tokenizer: Tokenizer, **settings: Any) -> GPT:
    """A small model whose biases and layer norms are random too, so that each one matters."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 48} | settings
    torch.manual_seed(1)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, **shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
            if name in ("wte.weight", "lm_head.weight"):
                parameter[model.vocab_size :] = 0
    return model


def make_run(directory: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """A run directory with some metrics and a checkpoint at step 20."""
    checkpoint = directory / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    tensors = {
        f"model.{name}": p.detach()[: model.vocab_size] if name.endswith("wte.weight") else p.data
        for name, p in model.named_parameters()
    }
    if "model.lm_head.weight" in tensors:
        tensors["model.lm_head.weight"] = tensors["model.lm_head.weight"][: model.vocab_size]
    config = Config(model=model.config)
    write_checkpoint(checkpoint, tensors, {"step": 20, "config": config.model_dump()}, tokenizer)
    rows = [
        {"step": 10, "train_loss": 3.0, "tokens": 1000},
        {"step": 20, "train_loss": 2.5, "tokens": 2000},
        {"step": 20, "val_loss": 2.25, "val_bpb": 1.125, "hellaswag_acc_norm": 0.2955},
        {"step": 30, "train_loss": 9.0, "tokens": 3000},
    ]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4')
    return directory


@torch.no_grad()
def greedy(model: GPT, ids: list[int], count: int) -> list[int]:
    """Greedy continuation without a cache."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def exported(directory: Path, model: GPT, tokenizer: Tokenizer, *options: str) -> Path:
    run = make_run(directory / "run", model, tokenizer)
    export.main(["--checkpoint", str(run), "--out", str(directory / "out"), *options])
    return directory / "out"


SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False},
    {"bias": False},
    {"bias": False, "tie_embeddings": False, "mlp_hidden": 40},
    {"qkv_bias": False, "dropout": 0.1},
    {"bias": False, "qkv_bias": True},
    {"norm": "post"},
    {"norm": "post", "tie_embeddings": False, "bias": False},
    {"architecture": "nanochat"},
    {"architecture": "nanochat", "n_head": 4, "n_kv_head": 2, "mlp_hidden": 40},
    {"architecture": "nanochat", "n_kv_head": 1, "tie_embeddings": True, "dropout": 0.1},
]
CLASSES = {
    ("gpt2", "pre"): "GPT2LMHeadModel",
    ("gpt2", "post"): "OpenAIGPTLMHeadModel",
    ("nanochat", "pre"): "NanoChatForCausalLM",
}


@pytest.mark.slow(5)
@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_transformers_computes_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    tokenizer = make_tokenizer("bpe")
    model = make_model(tokenizer, **settings)
    out = exported(tmp_path, model, tokenizer)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.dtype == torch.float32
    assert type(theirs).__name__ == CLASSES[model.config.architecture, model.config.norm]
    ids = torch.randint(model.vocab_size, (3, 48), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert_close(theirs(ids).logits, model(ids))
    # --checkpoint takes the exported directory too, and what transformers makes of it.
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / name, tmp_path / "theirs")
    for directory in (out, tmp_path / "theirs"):
        again, _, _ = load_model(directory)
        found = dict(again.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(found.pop(name), parameter), name
        assert not any(parameter.any() for parameter in found.values())  # biases of zeros


def assert_close(theirs: Tensor, ours: Tensor, tolerance: float = 1e-4) -> None:
    assert theirs.shape == ours.shape
    assert float((theirs - ours).abs().max()) < tolerance


@pytest.mark.slow(2)
@pytest.mark.parametrize(("architecture", "norm"), CLASSES)
def test_greedy_text_by_every_way_of_loading(
    tmp_path: Path,
    tokenizer: Tokenizer,
    architecture: str,
    norm: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformers.utils.logging.enable_propagation()  # to caplog: nothing may be warned of
    model = make_model(tokenizer, architecture=architecture, norm=norm)
    out = exported(tmp_path, model, tokenizer)
    prompt = "It's we'll"
    expected = greedy(model, tokenizer.encode(prompt), 20)
    if (architecture, norm) == ("gpt2", "pre"):
        theirs = transformers.GPT2LMHeadModel.from_pretrained(out)
    else:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    for kind in (transformers.AutoTokenizer, transformers.GPT2Tokenizer):
        tok = kind.from_pretrained(out)
        ids = tok(prompt, return_tensors="pt")
        reply = theirs.generate(**ids, max_new_tokens=20, do_sample=False)[0].tolist()
        assert reply == expected[: len(reply)]
        assert len(reply) == len(expected) or reply[-1] == tokenizer.eot_id
        assert tok.decode(reply) == tokenizer.decode(reply)
    pipe = transformers.pipeline("text-generation", model=str(out))
    text = pipe(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert text == tokenizer.decode(i for i in reply if i != tokenizer.eot_id)
    assert pipe(prompt)[0]["generated_text"].startswith(prompt)  # no option at all
    assert caplog.messages == []


def test_tokenizers_agree_on_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, content in tokenizer_files(tokenizer, 48).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    ids = tokenizer.encode(TEXT)
    loaders: dict[str, Callable[[], Any]] = {
        "auto": lambda: transformers.AutoTokenizer.from_pretrained(tmp_path),
        "gpt2": lambda: transformers.GPT2Tokenizer.from_pretrained(tmp_path),
    }
    for name, loader in loaders.items():
        theirs = loader()
        assert theirs(TEXT)["input_ids"] == ids, name
        assert theirs.decode(ids) == TEXT, name
        assert theirs.eos_token_id == tokenizer.eot_id, name
        if tokenizer.name != "char":
            assert len(theirs) == tokenizer.vocab_size, name
    (tmp_path / "tokenizer.json").unlink()  # vocab.json and merges.txt suffice
    assert transformers.GPT2Tokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == ids


@pytest.mark.slow
def test_gpt2_files_are_openai_s() -> None:
    """The sha256 of OpenAI's own encoder.json and vocab.bpe, as tiktoken (MIT) checks them."""
    files = tokenizer_files(load_tokenizer("gpt2"), 1024)
    digests = [hashlib.sha256(files[n].encode()).hexdigest() for n in ("vocab.json", "merges.txt")]
    assert digests == [
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ]


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tokenizer = make_tokenizer("char")
    model = make_model(tokenizer)
    out = exported(tmp_path, model, tokenizer, "--dtype", name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == dtype
    stored = theirs.transformer.h[1].mlp.c_fc.weight.t()
    assert torch.equal(stored, model.h[1].mlp.c_fc.weight.to(dtype))  # type: ignore[union-attr]


def test_model_card_describes_the_run(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("char")
    out = exported(tmp_path, make_model(tokenizer, bias=False), tokenizer)
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in (
        "| steps | 20 |",
        "| 2.5000 |",
        "| 2.2500 |",
        "| 1.1250 |",
        "| 0.2955 |",
        "2,000",
        "zeros",
    ):
        assert text in card
    assert "9.0" not in card  # a later step's


# --- import -------------------------------------------------------------------------------------


@pytest.mark.slow(2)
@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "nanochat"])
@pytest.mark.parametrize("tied", [True, False])
def test_import_what_transformers_wrote(tmp_path: Path, kind: str, tied: bool) -> None:
    """A random model that transformers saved in several shards: import, train, export again."""
    tokenizer = make_tokenizer("bpe")
    sizes: dict[str, Any] = {"n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
    if kind == "nanochat":
        sizes = {
            "max_position_embeddings": 40, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 72,
            "pad_token_id": None,
        }  # fmt: skip
    hf_config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=tokenizer.vocab_size,
        **sizes,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(hf_config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    source = tmp_path / "source"
    theirs.save_pretrained(source, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    for name, content in tokenizer_files(tokenizer, 40).items():
        (source / name).write_text(content, encoding="utf-8")
    import_hf.main([str(source), "--out", str(tmp_path / "checkpoint")])
    model, read, state = load_model(tmp_path / "checkpoint")
    assert (read.name, state["step"]) == ("bpe", 0)
    assert read.encode(TEXT) == tokenizer.encode(TEXT)
    ids = torch.randint(tokenizer.vocab_size, (2, 40))
    with torch.no_grad():
        assert_close(theirs(ids).logits, model(ids))
    # A few updates on both sides give the same model, also after an export.
    ours = torch.optim.SGD(model.parameters(), lr=0.05)
    other = torch.optim.SGD(theirs.parameters(), lr=0.05)
    for _ in range(3):
        ours.zero_grad()
        (model(ids[:, :-1], ids[:, 1:].contiguous()) / ids[:, 1:].numel()).backward()
        ours.step()
        other.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        other.step()
    export.export_hf(model, read, tmp_path / "again", torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert_close(again(ids).logits, theirs(ids).logits)


def test_import_names_of_the_hub(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Files like those of the hub's gpt2: no prefix, no head, mask buffers, fp16, vocab.json."""
    model = make_model(tokenizer)
    out = exported(tmp_path, model, tokenizer)
    weights = load_file(out / "model.safetensors")
    renamed = {name.removeprefix("transformer."): t.half() for name, t in weights.items()}
    for layer in range(2):
        renamed[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    save_file(renamed, out / "model.safetensors")
    (out / "tokenizer.json").unlink()
    import_hf.main([str(out), "--out", str(tmp_path / "checkpoint")])
    again, read, _ = load_model(tmp_path / "checkpoint")
    assert (read.name, read.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
    assert read.eot_id == tokenizer.eot_id
    assert read.encode(TEXT) == tokenizer.encode(TEXT)
    original = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, original[name].half().float()), name


def test_padded_vocabularies_are_cut(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe")
    out = exported(tmp_path, make_model(tokenizer), tokenizer)
    weights = load_file(out / "model.safetensors")
    wte = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = torch.cat([wte, torch.randn(112, 32)])
    save_file(weights, out / "model.safetensors")
    edit_json(out / "config.json", vocab_size=tokenizer.vocab_size + 112)
    model, _, _ = load_model(out)
    assert model.vocab_size == tokenizer.vocab_size
    assert torch.equal(model.wte.weight[: model.vocab_size], wte)


# --- bad input: one line, the right status, no files left ---------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def drop_tensor(path: Path) -> None:
    weights = load_file(path)
    del weights["transformer.h.1.ln_2.bias"]
    save_file(weights, path)


def reshape_tensor(path: Path) -> None:
    weights = load_file(path)
    weights["transformer.wpe.weight"] = torch.zeros(47, 32)
    save_file(weights, path)


def pickle_only(path: Path) -> None:
    torch.save({}, path.with_name("pytorch_model.bin"))
    path.unlink()


Damage = Callable[[Path], Any]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
BROKEN: list[tuple[str, Damage, type[GptDistError], str]] = [
    (
        CONFIG,
        lambda p: edit_json(p, model_type="llama"),
        UsageError,
        "model_type is 'llama'; valid",
    ),
    (CONFIG, lambda p: edit_json(p, activation_function="relu"), UsageError, "activation 'relu'"),
    (CONFIG, lambda p: edit_json(p, layer_norm_epsilon=1e-6), UsageError, "layer_norm_epsilon"),
    (CONFIG, lambda p: edit_json(p, n_layer="two"), UsageError, "n_layer = 'two'"),
    (CONFIG, lambda p: edit_json(p, n_head=5), UsageError, "n_head 5"),
    (CONFIG, lambda p: edit_json(p, vocab_size=9), GptDistError, "vocab_size is 9"),
    (CONFIG, lambda p: p.write_text("{"), GptDistError, "JSON"),
    (CONFIG, lambda p: p.unlink(), UsageError, "config.json: no such file"),
    (WEIGHTS, truncate, GptDistError, "model.safetensors: truncated"),
    (WEIGHTS, drop_tensor, GptDistError, "lack the tensor transformer.h.1.ln_2.bias"),
    (WEIGHTS, reshape_tensor, GptDistError, r"shape \(47, 32\)"),
    (WEIGHTS, pickle_only, UsageError, "pytorch_model.bin may be a pickle"),
    ("tokenizer.json", lambda p: p.write_text("[1"), GptDistError, "tokenizer cannot be read"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer("bpe")
    return exported(tmp_path_factory.mktemp("good"), make_model(tokenizer), tokenizer)


@pytest.mark.parametrize(
    ("file", "damage", "kind", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", str(v))[:30]
)
def test_broken_directories(
    tmp_path: Path, good: Path, file: str, damage: Damage, kind: type[GptDistError], message: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(good, source)
    damage(source / file)
    with pytest.raises(kind, match=message) as caught:
        import_hf.main([str(source), "--out", str(tmp_path / "new" / "checkpoint")])
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0: this variant"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}, "rotary .*yarn"),
        ({"rope_parameters": {"rope_theta": 500.0}}, "rotary .*500"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"num_key_value_heads": 5}, "n_kv_head 5"),
        ({"hidden_size": 9 * 6}, "an even size"),
    ],
    ids=str,
)
def test_variants_of_nanochat_are_refused(changes: dict[str, Any], message: str) -> None:
    data = transformers.NanoChatConfig().to_dict()
    assert from_hf_config(data, "x").context_length == 2048
    with pytest.raises(UsageError, match=message):
        from_hf_config(data | changes, "x")


def test_hub_name_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(GptDistError, match="gpt2-none: no such directory, and not found on") as e:
        import_hf.main(["nobody/gpt2-none", "--out", str(tmp_path / "checkpoint")])
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match="no such directory or file"):
        import_hf.main(["./nowhere", "--out", str(tmp_path / "checkpoint")])


def test_refused_exports(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("char")
    cases = [
        ({"n_layer": 0}, "bigram"),
        ({"norm": "post", "mlp_hidden": 40}, "openai-gpt"),
    ]
    for number, (settings, message) in enumerate(cases):
        run = make_run(tmp_path / str(number), make_model(tokenizer, **settings), tokenizer)
        with pytest.raises(UsageError, match=message):
            export.main(["--checkpoint", str(run), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    run = make_run(tmp_path / "run", make_model(tokenizer), tokenizer)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").touch()
    with pytest.raises(UsageError, match="exists already"):
        export.main(["--checkpoint", str(run), "--out", str(taken)])
    assert [path.name for path in taken.iterdir()] == ["precious"]
    with pytest.raises(UsageError, match="no such run"):
        export.main(["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
