"""Loads a checkpoint into a warm decoder, and later checkpoints into weights for it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt_dist.checkpoints.checkpoint import resolve
from gpt_dist.checkpoints.reader import load_model
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.generation import score
from gpt_dist.inference.results import Weights
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.model.gpt import GPT
from gpt_dist.text.bundled import shakespeare
from gpt_dist.text.tokenizers import Tokenizer
from serve.options import Options


@dataclass(frozen=True)
class Loaded:
    """A model ready to be served."""

    decoder: Decoder
    tokenizer: Tokenizer
    parameters: int
    shape: dict[str, int]
    """n_layer, n_head, n_embd."""
    directory: Path
    version: str
    report: list[str]
    """Lines to print at start-up."""


def load(options: Options) -> Loaded:
    """Load the checkpoint, convert it and warm up.

    Raises:
        UsageError: there is no checkpoint, or an option does not fit it.
        GptDistError: the checkpoint is damaged or gives logits that are not finite, or the device
            does not exist.
    """
    began = time.monotonic()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = _device(options.device)
    directory = resolve(options.checkpoint)
    model, tokenizer, state = load_model(directory)
    _match(model, tokenizer, directory)
    _check_finite(model, directory)
    slots = options.max_slots or (64 if device.type == "cuda" else 32)
    decoder = Decoder(
        model,
        max_slots=slots,
        max_context=options.max_context,
        device=device,
        dtype=options.dtype,  # type: ignore[arg-type]
        deterministic=options.deterministic,
        speculate=options.speculate == "auto",
    )
    loaded = time.monotonic()
    _warm(decoder, tokenizer)
    config = model.config
    version = weights_version(directory, state)
    report = [
        f"{directory}: {model.num_parameters():,} parameters, weights {version}",
        f"{device}, {decoder.backend}, {decoder.dtype} weights, "
        f"{slots} slots of {decoder.max_context} tokens, "
        f"{decoder.cache_bytes / 1e6:,.0f} MB of KV cache",
        f"loaded in {loaded - began:.1f} s, warmed up in {time.monotonic() - loaded:.1f} s",
    ]
    if decoder.dtype == "int8":
        report.append(_int8_loss(model, decoder, tokenizer))
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    return Loaded(
        decoder, tokenizer, model.num_parameters(), shape, directory, version, report
    )  # fmt: skip


def load_next(decoder: Decoder, tokenizer: Tokenizer, directory: Path) -> tuple[Weights, str]:
    """Load the weights of another checkpoint of the same run; returns them and their version.

    Raises:
        GptDistError: the checkpoint is damaged, its shape or tokenizer differs, or it gives logits
            that are not finite.
    """
    model, other, state = load_model(directory)
    if other.to_json() != tokenizer.to_json():
        raise GptDistError(f"{directory}: its tokenizer differs from the one being served")
    _match(model, other, directory)
    _check_finite(model, directory)
    return decoder.load_weights(model), weights_version(directory, state)


def weights_version(directory: Path, state: dict[str, Any]) -> str:
    """The directory's name; for a checkpoint, also the first digits of the weights' SHA-256."""
    digest = state.get("files", {}).get("model.safetensors", "")
    return f"{directory.name}-{digest[:8]}" if digest else directory.name


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GptDistError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def _match(model: GPT, tokenizer: Tokenizer, directory: Path) -> None:
    """Check that every token has a row in the model. Further rows are ignored."""
    if model.vocab_size < tokenizer.vocab_size:
        raise GptDistError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but the model only {model.vocab_size}"
        )
    model.vocab_size = tokenizer.vocab_size  # other rows cannot be decoded


def _check_finite(model: GPT, directory: Path) -> None:
    """Refuse the weights of a diverged run, which would give only empty answers.

    Raises:
        GptDistError: a weight or a logit is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        if not torch.stack(torch.aminmax(parameter.detach())).isfinite().all():
            raise GptDistError(f"{directory}: {name} has values that are not finite")
    count = min(32, model.config.context_length)
    ids = torch.arange(count, device=model.wte.weight.device) * 7919 % model.vocab_size
    with torch.inference_mode():
        finite = model(ids[None]).isfinite().all()
    if not finite:
        raise GptDistError(f"{directory}: its logits are not finite")


def _warm(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Run each kind of work once, so that the first request is not slower than later ones."""
    with contextlib.suppress(UsageError):  # the vocabulary may lack this character
        tokenizer.encode("a")
    tokenizer.token_bytes(0)
    prompt = np.zeros(min(128, decoder.max_context), np.int64)
    decoder.prefill(0, prompt[:-1])
    decoder.activate(0, SamplingParams(top_k=50), prompt)
    decoder.step()
    decoder.free(0)


def _int8_loss(model: GPT, decoder: Decoder, tokenizer: Tokenizer) -> str:
    """Measure how int8 rounding changes the loss on the text bundled with the package."""
    try:
        ids = tokenizer.encode(shakespeare()[:4000])[: decoder.max_context]
    except UsageError:  # the vocabulary lacks some of its characters
        return "int8: loss difference not measured: the tokenizer cannot encode the sample text"
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=model.wte.weight.device))[0].float()
    exact = -logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    rounded = -np.concatenate([part.logprobs for part in score(decoder, ids)]).mean()
    return (
        f"int8: loss {rounded:.4f} against {exact:.4f} in fp32 ({rounded - exact:+.4f}) "
        f"on {len(ids)} tokens of Shakespeare"
    )
