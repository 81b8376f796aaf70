"""HellaSwag, LAMBADA and the perplexity of a text.

HellaSwag (Zellers et al. 2019, arXiv:1905.07830) has two styles that differ by a few points:
``completion``, as llm.c and build-nanogpt score it (unchanged text; GPT-2 124M 29.55), and
``lm_eval``, as lm-evaluation-harness does (cleaned text; 31.14).
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.evaluation.scoring import Request, encode_pair, score
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import Tokenizer

STYLES = ("completion", "lm_eval")


class HellaSwagRow(BaseModel):
    """A line of hellaswag_val.jsonl (github.com/rowanz/hellaswag)."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: list[str] = Field(min_length=2)
    label: int = Field(ge=0)


class LambadaRow(BaseModel):
    """A line of lambada_test.jsonl, in OpenAI's version for GPT-2."""

    text: str = Field(pattern=r"\S\s+\S")


class Mean(NamedTuple):
    """A mean and its standard error."""

    value: float
    stderr: float


Row = TypeVar("Row", bound=BaseModel)


# --- reading ------------------------------------------------------------------------------------


def read_hellaswag(source: str | Path | None, limit: int | None = None) -> list[HellaSwagRow]:
    """The validation examples, from JSON lines (may be gzipped) or the hub (Rowan/hellaswag).

    Raises:
        UsageError: no such file, or a line is malformed; the message gives its number.
        GptDistError: the hub cannot be reached.
    """
    if source is None:
        return _from_hub("Rowan/hellaswag", "validation", HellaSwagRow, limit)
    return _from_file(Path(source), HellaSwagRow, limit)


def read_lambada(source: str | Path | None, limit: int | None = None) -> list[LambadaRow]:
    """The test passages, from JSON lines (may be gzipped) or the hub (EleutherAI/lambada_openai).

    Raises:
        UsageError: no such file, or a line is malformed; the message gives its number.
        GptDistError: the hub cannot be reached.
    """
    if source is None:
        return _from_hub("EleutherAI/lambada_openai", "test", LambadaRow, limit)
    return _from_file(Path(source), LambadaRow, limit)


def read_source(path: Path) -> str:
    """Read a text file, decompressed if its name ends in .gz.

    Raises:
        UsageError: no such file, or it is empty or not UTF-8; the message gives the byte.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: not a whole gzip file ({error})") from None
    if not text.strip():
        raise UsageError(f"{path}: is empty")
    return text


def _from_file(path: Path, kind: type[Row], limit: int | None) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(read_source(path).split("\n"), start=1):
        if limit is not None and len(rows) >= limit:
            break
        if not line.strip():
            continue
        try:
            rows.append(_check(json.loads(line), kind))
        except ValueError as error:
            reason = "not JSON" if isinstance(error, json.JSONDecodeError) else error
            raise UsageError(f"{path}, line {number}: {reason}") from None
    return rows


def _check(data: Any, kind: type[Row]) -> Row:
    try:
        row = kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise ValueError(f"{where}: {first['msg'].lower()}") from None
    if isinstance(row, HellaSwagRow) and row.label >= len(row.endings):
        raise ValueError(f"label: {row.label}, but there are {len(row.endings)} endings")
    return row


def _from_hub(name: str, split: str, kind: type[Row], limit: int | None) -> list[Row]:
    from datasets.load import load_dataset
    from huggingface_hub import HfApi, constants

    reason, offline = "", constants.HF_HUB_OFFLINE
    try:
        try:
            HfApi().dataset_info(name, timeout=15)
        except Exception as error:  # network libraries raise many classes
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            constants.HF_HUB_OFFLINE = True  # look in the cache alone; else it tries five times
        data = load_dataset(name, split=split)
    except Exception as error:
        reason = reason or next(iter(str(error).splitlines()), "") or type(error).__name__
        raise GptDistError(
            f"{name} cannot be downloaded from the Hugging Face hub ({reason}); "
            "give a local file (evaluate: --source, train: eval.hellaswag_path)"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = offline
    count = len(data) if limit is None else min(limit, len(data))
    return [_check(data[i], kind) for i in range(count)]


# --- tasks --------------------------------------------------------------------------------------


def hellaswag(
    model: GPT,
    tokenizer: Tokenizer,
    rows: Sequence[HellaSwagRow],
    *,
    styles: Sequence[str] = STYLES,
    on_done: Callable[[int, int], None] | None = None,
    **scoring: Any,
) -> dict[str, dict[str, Mean]]:
    """Accuracy of choosing the right ending, by likelihood and by length-normalised likelihood.

    ``acc_norm`` divides by the tokens of the ending in completion style, by its characters in
    lm_eval style.

    Args:
        rows: from ``read_hellaswag``.
        styles: some of ``STYLES``.
        on_done: called with the number of endings scored so far and in all, over all styles.
        scoring: ``batch_size``, ``world`` and ``dtype`` of ``scoring.score``.

    Returns:
        Style → ``acc`` and ``acc_norm``; the same on every rank.
    """
    results = {}
    total = len(styles) * sum(len(row.endings) for row in rows)
    for number, style in enumerate(styles):
        requests, lengths = [], []
        for row in rows:
            for request, length in _endings(tokenizer, row, style):
                requests.append(request)
                lengths.append(length)

        def report(done: int, of: int, style_number: int = number) -> None:
            if on_done is not None:
                on_done(style_number * of + done, total)

        likelihood = score(model, requests, on_done=report, **scoring).log_likelihood.numpy()
        hits: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
        start = 0
        for row in rows:
            part = slice(start, start + len(row.endings))
            start = part.stop
            normed = likelihood[part] / np.maximum(1, lengths[part])
            hits["acc"].append(int(likelihood[part].argmax()) == row.label)
            hits["acc_norm"].append(int(normed.argmax()) == row.label)
        results[style] = {name: _mean(np.array(values, float)) for name, values in hits.items()}
    return results


def _endings(tokenizer: Tokenizer, row: HellaSwagRow, style: str) -> list[tuple[Request, int]]:
    """Each ending's request and the length by which acc_norm divides."""
    if style == "completion":
        context = tokenizer.encode(row.ctx)
        endings = [tokenizer.encode(f" {ending}") for ending in row.endings]
        return [(Request(context, ending), len(ending)) for ending in endings]
    query = _clean(f"{row.activity_label}: {row.ctx_a} {row.ctx_b.capitalize()}")
    cleaned = [_clean(ending) for ending in row.endings]
    return [(encode_pair(tokenizer, query, f" {ending}"), len(ending)) for ending in cleaned]


def _clean(text: str) -> str:
    """Remove WikiHow's markup in the three steps of lm-evaluation-harness."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def lambada(
    model: GPT, tokenizer: Tokenizer, rows: Sequence[LambadaRow], **scoring: Any
) -> dict[str, Mean]:
    """Predicting the last word of a passage (Paperno et al. 2016, arXiv:1606.06031).

    Args:
        rows: of ``read_lambada``.
        scoring: further arguments of ``scoring.score``.

    Returns:
        ``acc``: share of words that greedy decoding yields; ``perplexity`` per word.
    """
    requests = []
    for row in rows:
        head, _, word = row.text.rpartition(" ")
        requests.append(encode_pair(tokenizer, head, f" {word}"))
    scores = score(model, requests, **scoring)
    loss = _mean(-scores.log_likelihood.numpy())
    value = math.exp(min(loss.value, 700.0))
    return {
        "acc": _mean(scores.greedy.double().numpy()),
        "perplexity": Mean(value, value * loss.stderr),
    }


def windows(ids: list[int], prefix: int | None, context: int, stride: int) -> list[Request]:
    """Split a text into requests so that every token is scored once.

    The first window scores all its tokens. Each later one scores the next ``stride`` tokens and
    sees as many before them as fit into the context.

    Args:
        ids: the text.
        prefix: token before the text (end-of-text); None = its first token is not scored.
    """
    if prefix is None:
        prefix, ids = ids[0], ids[1:]
    stream = [prefix, *ids]
    requests, done = [], 1
    while done < len(stream):
        end = min(len(stream), done + (context if done == 1 else stride))
        requests.append(Request(stream[max(0, end - context - 1) : done], stream[done:end]))
        done = end
    return requests


def perplexity(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    *,
    stride: int | None = None,
    limit: int | None = None,
    **scoring: Any,
) -> dict[str, float]:
    """Perplexity of a text by sliding windows.

    Args:
        stride: tokens between the starts of windows; None = the context length, no overlap.
        limit: at most so many tokens of the text.
        scoring: further arguments of ``scoring.score``.

    Returns:
        ``loss`` (nats per token), ``perplexity`` (per token), ``bits_per_byte``,
        ``byte_perplexity``, ``word_perplexity`` (words separated by white space), ``tokens``.

    Raises:
        UsageError: the stride is longer than the context, or the text is a single token.
    """
    context = model.config.context_length
    stride = stride or context
    if stride > context:
        raise UsageError(f"--stride {stride}: must be at most the context length, {context}")
    ids = tokenizer.encode(text)
    if limit is not None and limit < len(ids):
        ids = ids[:limit]
        text = tokenizer.decode(ids)
    requests = windows(ids, tokenizer.eot_id, context, stride)
    if not requests:
        raise UsageError("--source: a text of one token has no perplexity")
    nats = -float(score(model, requests, **scoring).log_likelihood.sum())
    tokens = sum(len(request.continuation) for request in requests)
    length, words = len(text.encode("utf-8")), len(re.split(r"\s+", text))
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / length / math.log(2),
        "byte_perplexity": math.exp(nats / length),
        "word_perplexity": math.exp(min(nats / words, 700.0)),
        "tokens": tokens,
    }


def _mean(values: np.ndarray) -> Mean:
    """Mean and standard error of the mean, as lm-evaluation-harness computes them."""
    count = len(values)
    spread = float(values.std(ddof=1)) if count > 1 else math.nan
    return Mean(float(values.mean()), spread / math.sqrt(count))
