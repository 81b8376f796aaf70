"""Scores against lm-evaluation-harness, and against loops written here over transformers' model."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_dist import evaluate
from gpt_dist.checkpoints.reader import load_model
from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.evaluation import tasks
from gpt_dist.evaluation.scoring import Request, score
from gpt_dist.export import export_hf
from gpt_dist.model.gpt import GPT
from gpt_dist.text.tokenizers import BpeTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from tests import warm
from tests.components import require_module

transformers = require_module("transformers")
transformers.utils.logging.set_verbosity_error()
CONTEXT = 40
SPEECH = """
the a man woman dog roof cake bike water is are was then slowly puts takes jumps over under
with [header] [title] [step] She He into 1st 20% can't “well” café, done. again! and so on
"""


def export_random_model(tokenizer: Tokenizer, directory: Path) -> Path:
    torch.manual_seed(6)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": CONTEXT}
    model = GPT(ModelConfig.model_validate(shape | {"vocab_size": tokenizer.vocab_size})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        model.wte.weight[tokenizer.vocab_size :] = 0
    export_hf(model, tokenizer, directory, torch.float32)
    return directory


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with GPT-2's vocabulary, exported."""
    directory = tmp_path_factory.mktemp("gpt2") / "exported"
    return export_random_model(load_tokenizer("gpt2"), directory)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a small vocabulary, exported."""
    directory = tmp_path_factory.mktemp("model") / "exported"
    return export_random_model(BpeTokenizer.train([SPEECH], vocab_size=400), directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the form of the real ones; some contexts are longer than the model's."""
    directory = tmp_path_factory.mktemp("data")
    draw = random.Random(7)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(SPEECH.split(), k=draw.randint(low, high)))

    rows = []
    for number in range(40):
        ctx_a, ctx_b = words(3, 50 if number % 7 == 0 else 12), words(0, 2)
        row = {"ind": number, "activity_label": words(1, 2), "ctx_a": ctx_a, "ctx_b": ctx_b}
        row |= {"ctx": f"{ctx_a} {ctx_b}".strip(), "label": draw.randrange(4)}
        rows.append(row | {"endings": [words(0, 11) + " end." for _ in range(4)]})
    passages = [{"text": words(4, 60)} for _ in range(50)]
    for name, content in {"hellaswag": rows, "lambada": passages}.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (directory / "text.txt").write_text(words(400, 400) + "\n", encoding="utf-8")
    return directory


def evaluate_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    evaluate.main([*map(str, arguments), "--device", "cpu", "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# --- lm-evaluation-harness ----------------------------------------------------------------------

TASKS = {
    "hellaswag": """
include: {package}/hellaswag/hellaswag.yaml
task: our_hellaswag
training_split: null
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}/hellaswag.jsonl}}}}
""",
    "lambada": """
include: {package}/lambada/lambada_openai.yaml
task: our_lambada
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {data}/lambada.jsonl}}}}
""",
    "perplexity": """
task: our_perplexity
output_type: loglikelihood_rolling
dataset_path: text
dataset_kwargs: {{data_files: {{test: {data}/text.txt}}, sample_by: document}}
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
}


@pytest.fixture(scope="module")
def harness(
    gpt2_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    """Scores of the exported model by lm-eval, on the same files."""
    lm_eval = require_module("lm_eval", "lm-eval is not installed: pip install 'gpt_dist[dev]'")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    configs = tmp_path_factory.mktemp("tasks")
    package = Path(lm_eval.__file__).parent / "tasks"
    for name, text in TASKS.items():
        filled = text.format(package=package, data=data)
        (configs / f"{name}.yaml").write_text(filled, encoding="utf-8")
    os.environ.setdefault("HF_DATASETS_CACHE", str(configs / "cache"))
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(gpt2_dir), device="cpu", batch_size=8),
        tasks=[f"our_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(configs), include_defaults=False),
        bootstrap_iters=0,
    )
    return {
        name: {key.partition(",")[0]: value for key, value in scores.items()}
        for name, scores in found["results"].items()
    }


@pytest.mark.slow
def test_hellaswag_equals_lm_eval(
    harness: Any, gpt2_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = data / "hellaswag.jsonl"
    ours = evaluate_json(
        capsys, "--checkpoint", gpt2_dir, "--task", "hellaswag", "--source", source
    )["lm_eval"]
    theirs = harness["our_hellaswag"]
    assert ours["acc"]["value"] == pytest.approx(theirs["acc"], abs=1e-12)
    assert ours["acc_norm"]["value"] == pytest.approx(theirs["acc_norm"], abs=1e-12)


@pytest.mark.slow
def test_lambada_equals_lm_eval(
    harness: Any, gpt2_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = data / "lambada.jsonl"
    ours = evaluate_json(capsys, "--checkpoint", gpt2_dir, "--task", "lambada", "--source", source)
    theirs = harness["our_lambada"]
    assert ours["acc"]["value"] == pytest.approx(theirs["acc"], abs=1e-12)
    assert ours["perplexity"]["value"] == pytest.approx(theirs["perplexity"], rel=1e-4)


@pytest.mark.slow
def test_perplexity_equals_lm_eval(
    harness: Any, gpt2_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = data / "text.txt"
    ours = evaluate_json(
        capsys, "--checkpoint", gpt2_dir, "--task", "perplexity", "--source", source
    )
    theirs = harness["our_perplexity"]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


# --- loops over transformers --------------------------------------------------------------------


@torch.no_grad()
def token_losses(model: Any, ids: list[int]) -> Tensor:
    """Nats of every token of a short text but the first."""
    row = torch.tensor([ids])
    return torch.nn.functional.cross_entropy(
        model(row).logits[0, :-1], row[0, 1:], reduction="none"
    )


def test_hellaswag_completion_style(model_dir: Path, data: Path) -> None:
    """llm.c's rule: the ending after a space, sum and mean of its tokens' losses."""
    model, tokenizer, _ = load_model(model_dir)
    rows = [r for r in tasks.read_hellaswag(data / "hellaswag.jsonl") if len(r.ctx) < 60][:8]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    hits = {"acc": 0, "acc_norm": 0}
    for row in rows:
        context = tokenizer.encode(row.ctx)
        losses = []
        for ending in row.endings:
            tail = tokenizer.encode(" " + ending)
            losses.append(token_losses(theirs, context + tail)[-len(tail) :])
        hits["acc"] += int(torch.stack([x.sum() for x in losses]).argmin()) == row.label
        hits["acc_norm"] += int(torch.stack([x.mean() for x in losses]).argmin()) == row.label
    ours = tasks.hellaswag(model, tokenizer, rows, styles=["completion"], batch_size=7)
    assert len(rows) == 8
    assert {k: v.value for k, v in ours["completion"].items()} == {
        name: count / len(rows) for name, count in hits.items()
    }


@pytest.mark.slow(2)
@pytest.mark.parametrize("stride", [1, 7, CONTEXT])
def test_sliding_windows(model_dir: Path, data: Path, stride: int) -> None:
    """Each token's loss, given the tokens before it in its window."""
    model, tokenizer, _ = load_model(model_dir)
    text = (data / "text.txt").read_text(encoding="utf-8")[:500]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    stream = [tokenizer.eot_id or 0, *tokenizer.encode(text)]
    nats = float(token_losses(theirs, stream[: CONTEXT + 1][:CONTEXT]).sum())
    nats += float(token_losses_last(theirs, stream[: CONTEXT + 1], 1))
    done = CONTEXT + 1
    while done < len(stream):
        end = min(len(stream), done + stride)
        nats += token_losses_last(theirs, stream[end - CONTEXT - 1 : end], end - done)
        done = end
    ours = tasks.perplexity(model, tokenizer, text, stride=stride, batch_size=5)
    assert ours["tokens"] == len(stream) - 1
    assert ours["loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    assert ours["perplexity"] == pytest.approx(math.exp(ours["loss"]))


@torch.no_grad()
def token_losses_last(model: Any, ids: list[int], count: int) -> float:
    """Nats of the last ``count`` tokens of CONTEXT + 1: the last one is never an input."""
    logits = model(torch.tensor([ids[:-1]])).logits[0, -count:]
    wanted = torch.tensor(ids[-count:])
    return float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))


def test_windows_score_each_token_once() -> None:
    for length, context, stride in [(1, 4, 2), (4, 4, 4), (5, 4, 1), (23, 8, 3), (24, 8, 8)]:
        ids = list(range(100, 100 + length))
        for prefix in (7, None):
            requests = tasks.windows(ids, prefix, context, stride)
            scored = [token for request in requests for token in request.continuation]
            assert scored == (ids if prefix is not None else ids[1:])
            assert all(len(r.context) + len(r.continuation) <= context + 1 for r in requests)
            assert all(r.context for r in requests)


def test_batches_do_not_matter(model_dir: Path) -> None:
    model, tokenizer, _ = load_model(model_dir)
    model.train()
    draw = random.Random(8)
    requests = [
        Request(
            [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(1, 60))],
            [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(1, 20))],
        )
        for _ in range(23)
    ]
    alone = [score(model, [request]).log_likelihood.item() for request in requests]
    seen: list[tuple[int, int]] = []
    together = score(model, requests, batch_size=5, on_done=lambda *n: seen.append(n))
    assert together.log_likelihood.tolist() == pytest.approx(alone, rel=1e-5)
    assert seen[-1] == (23, 23)
    assert model.training


def test_greedy_is_what_greedy_decoding_says(model_dir: Path) -> None:
    model, tokenizer, _ = load_model(model_dir)
    ids = [tokenizer.eot_id or 0]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    wrong = [*ids[:4], (ids[4] + 1) % tokenizer.vocab_size, ids[5]]
    requests = [Request(ids[:1], ids[1:]), Request(wrong[:1], wrong[1:])]
    assert score(model, requests).greedy.tolist() == [True, False]


@pytest.mark.slow
def test_ranks_share_the_work(model_dir: Path, data: Path) -> None:
    """Two ranks print what one process prints, once."""
    source = data / "hellaswag.jsonl"
    arguments = ["--checkpoint", model_dir, "--task", "hellaswag", "--source", source]
    command = [*map(str, arguments), "--json", "--device", "cpu", "--limit", "21"]
    outputs = []
    for ranks in (1, 2):
        done = warm.run_ranks("gpt_dist.evaluate", command, ranks)
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout))
    assert outputs[0] == outputs[1]
    assert outputs[0]["examples"] == 21


def test_text_for_people(
    model_dir: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    packed = tmp_path / "hellaswag.jsonl.gz"
    packed.write_bytes(gzip.compress((data / "hellaswag.jsonl").read_bytes()))
    options = ["--checkpoint", str(model_dir), "--limit", "5", "--source"]
    evaluate.main([*options, str(packed), "--task", "hellaswag"])
    evaluate.main([*options, str(data / "lambada.jsonl"), "--task", "lambada"])
    evaluate.main([*options, str(data / "text.txt"), "--task", "perplexity", "--precision", "bf16"])
    out = capsys.readouterr().out
    for text in ("hellaswag, 5 examples", "completion style", "lm-eval style", "acc_norm 0."):
        assert text in out
    assert "lambada, 5 examples" in out
    assert "over 5 tokens" in out


def test_tokenizer_without_end_of_text() -> None:
    tokenizer: Tokenizer = CharTokenizer("abc ")
    torch.manual_seed(9)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8, "vocab_size": 4}
    model = GPT(ModelConfig.model_validate(shape)).eval()
    found = tasks.perplexity(model, tokenizer, "abc abc abc abc")
    assert found["tokens"] == 14  # the first character has nothing before it
    with pytest.raises(UsageError, match="a text of one token"):
        tasks.perplexity(model, tokenizer, "a")


# --- bad input ----------------------------------------------------------------------------------

GOOD = {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "ctx": "a b", "label": 1}
GOOD_LINE = json.dumps(GOOD | {"endings": ["p", "q"]})


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("hellaswag", f"{GOOD_LINE}\n{GOOD_LINE[:-5]}\n", "line 2: not JSON"),
        ("hellaswag", f"{GOOD_LINE}\n\n{json.dumps(GOOD)}\n", "line 3: endings: field required"),
        ("hellaswag", json.dumps(GOOD | {"endings": ["p", "q"], "label": 2}), "line 1: label: 2"),
        ("hellaswag", json.dumps(GOOD | {"endings": "pq"}), "line 1: endings: "),
        ("hellaswag", "[1]", "line 1: the line: "),
        ("lambada", '{"text": "one"}', "line 1: text: "),
        ("lambada", "", "is empty"),
        ("perplexity", " \n", "is empty"),
    ],
)
def test_broken_sources(
    tmp_path: Path, model_dir: Path, task: str, content: str, message: str
) -> None:
    source = tmp_path / "source.txt"
    source.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        evaluate.main(["--checkpoint", str(model_dir), "--task", task, "--source", str(source)])
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "hellaswagg"], "--task hellaswagg: no such task; valid are hellaswag, lambada"),
        (["--task", "perplexity"], "needs --source"),
        (["--task", "lambada", "--stride", "3"], "--stride: only for"),
        (["--task", "lambada", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--task", "lambada", "--source", "none.jsonl"], "none.jsonl: no such file"),
        (["--task", "perplexity", "--source", __file__, "--stride", "41"], "--stride 41: must be"),
    ],
)
def test_bad_arguments(model_dir: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate.main(["--checkpoint", str(model_dir), "--device", "cpu", *arguments])


def test_invalid_utf8_is_located(tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_bytes(b"hello \xff world")
    with pytest.raises(UsageError, match="not UTF-8 at byte 6"):
        tasks.read_source(source)


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One request finds out; then only the cache is searched, without further attempts."""
    from huggingface_hub import constants

    asked = []

    def unreachable(*_: object, **__: object) -> None:
        asked.append(constants.HF_HUB_OFFLINE)
        raise ConnectionError("no route to host\nmore" if len(asked) == 1 else "not in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("datasets.load.load_dataset", unreachable)
    with pytest.raises(GptDistError, match=r"\(no route to host\); give a local file") as caught:
        tasks.read_hellaswag(None)
    assert not isinstance(caught.value, UsageError)
    assert asked == [False, True]
    assert not constants.HF_HUB_OFFLINE
