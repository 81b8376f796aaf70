"""`python -m gpt_dist.generate` against the model it loads."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from gpt_dist.checkpoints.writer import write_checkpoint
from gpt_dist.config.settings import Config, ModelConfig
from gpt_dist.generate import main
from gpt_dist.model.gpt import GPT, VOCAB_PARAMETERS
from gpt_dist.text.tokenizers import CharTokenizer, Tokenizer
from tests.decoders import small_model

ALPHABET = "abcdefghijklmnopqrstuvwxyz äöü🙂."


def save(directory: Path, tokenizer: Tokenizer) -> tuple[Path, GPT]:
    model = small_model(vocab_size=tokenizer.vocab_size)
    config = Config(model=ModelConfig.model_validate(model.config.model_dump()))
    tensors = {}
    for name, tensor in model.state_dict().items():
        cut = tensor[: model.vocab_size] if name in VOCAB_PARAMETERS else tensor
        tensors[f"model.{name}"] = cut.contiguous()
    directory.mkdir()
    write_checkpoint(directory, tensors, {"step": 1, "config": config.model_dump()}, tokenizer)
    return directory, model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT]:
    return save(tmp_path_factory.mktemp("generate") / "step-00000001", CharTokenizer(ALPHABET))


def run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(list(args))
    return capsys.readouterr().out


def test_greedy_text_is_that_of_the_model(
    checkpoint: tuple[Path, GPT], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, model = checkpoint
    tokenizer = CharTokenizer(ALPHABET)
    ids = tokenizer.encode("once upon")
    for _ in range(20):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    flags = ["--temperature", "0", "--max-new-tokens", "20", "--dtype", "fp32"]
    flags += ["--checkpoint", str(directory)]
    assert run(capsys, *flags, "--prompt", "once upon") == tokenizer.decode(ids) + "\n"


def test_text_goes_on_past_the_context_and_says_so_once(
    checkpoint: tuple[Path, GPT], capsys: pytest.CaptureFixture[str]
) -> None:
    """The context of 96 is full after 7 tokens; its last 48 go on."""
    directory, model = checkpoint
    tokenizer = CharTokenizer(ALPHABET)
    prompt = "a full prompt. " * 6
    ids = tokenizer.encode(prompt)
    window = list(ids)
    for _ in range(150):
        token = int(model(torch.tensor([window]))[0, -1].argmax())
        ids.append(token)
        window = [*window, token] if len(window) < 96 else [*window, token][-48:]
    flags = ["--temperature", "0", "--dtype", "fp32", "--checkpoint", str(directory)]
    flags += ["--prompt", prompt, "--max-new-tokens"]
    main([*flags, "150", "--num-samples", "2"])
    out, err = capsys.readouterr()
    assert out == f"{tokenizer.decode(ids)}\n--------\n{tokenizer.decode(ids)}\n"
    assert err.count("note: the text passed the model's context of 96 tokens") == 1
    main([*flags, "150", "--stop-at-context"])
    out, err = capsys.readouterr()
    assert out == tokenizer.decode(ids[:97]) + "\n"
    assert err == "ended: the model's context of 96 tokens is full\n"
    main([*flags, "8"])
    assert "note: the text passed" in capsys.readouterr().err
    for more in (["7"], ["7", "--stop-at-context"]):  # ends just there, by the limit
        main([*flags, *more])
        assert capsys.readouterr() == (tokenizer.decode(ids[:97]) + "\n", "")


def test_a_prompt_beyond_the_context_is_cut_from_the_left(
    checkpoint: tuple[Path, GPT], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(checkpoint[0]), "--temperature", "0", "--max-new-tokens", "60"]
    long = "some text before it. " * 3 + "abcdefghijklmnop" * 6
    main([*flags, "--prompt", long])
    out, err = capsys.readouterr()
    main([*flags, "--prompt", long[-96:]])
    assert out == long[:-96] + capsys.readouterr().out
    assert len(out) == len(long) + 60 + 1
    assert "note: --prompt: 159 tokens; the model sees the last 96" in err


def test_samples_are_those_of_their_seeds(
    checkpoint: tuple[Path, GPT], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(checkpoint[0]), "--prompt", "ab", "--max-new-tokens", "15"]
    together = run(capsys, *flags, "--num-samples", "3", "--seed", "7").split("--------\n")
    alone = [run(capsys, *flags, "--seed", str(seed)) for seed in (7, 8, 9)]
    assert together == alone
    assert len(set(alone)) == 3
    assert all(text.startswith("ab") and len(text) == 2 + 15 + 1 for text in alone)


def test_the_prompt_can_come_from_standard_input(
    checkpoint: tuple[Path, GPT],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--checkpoint", str(checkpoint[0]), "--max-new-tokens", "5"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert run(capsys, *flags, "--prompt", "-") == run(capsys, *flags, "--prompt", "from a pipe")


def test_without_a_prompt_a_document_begins_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = save(tmp_path / "model", CharTokenizer(ALPHABET, eot=True))
    flags = ["--checkpoint", str(directory), "--max-new-tokens", "90", "--temperature", "3"]
    ended = run(capsys, *flags, "--num-samples", "8", "--top-k", "0")
    on = run(capsys, *flags, "--num-samples", "8", "--top-k", "0", "--ignore-eos")
    for short, long in zip(ended.split("--------\n"), on.split("--------\n"), strict=True):
        assert long.startswith(short[:-1])
    assert len(ended) < len(on)
