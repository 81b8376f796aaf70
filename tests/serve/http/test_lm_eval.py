"""lm-evaluation-harness asks the server, and gets what it gets from the exported model."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_dist.export import export_hf
from gpt_dist.inference.decoder import Decoder
from gpt_dist.text.tokenizers import load_tokenizer
from serve.server import Server
from tests.components import require_module
from tests.serve.conftest import LiveServer, StartServer, loaded, tiny_model
from tests.serve.http.conftest import url

ROWS = 100
WORDS = """
the a man woman dog roof cake bike water is are was then slowly puts takes jumps over under
with [header] [title] [step] She He into 1st 20% can't “well” café, done. again! and so on
"""
TASK = """
include: {package}/hellaswag/hellaswag.yaml
task: our_hellaswag
training_split: null
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
"""


def write_rows(path: Path) -> Path:
    """Rows in the form of HellaSwag's."""
    draw = random.Random(7)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(low, high)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            first, second = words(3, 12), words(0, 2)
            row = {
                "ind": number, "activity_label": words(1, 2), "ctx_a": first, "ctx_b": second,
                "ctx": f"{first} {second}".strip(), "label": draw.randrange(4),
                "endings": [words(0, 11) + " end." for _ in range(4)],
            }  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


@pytest.mark.slow(seconds=30)
def test_the_harness_finds_no_difference(start: StartServer, tmp_path: Path) -> None:
    lm_eval = require_module("lm_eval", "lm-eval is not installed: pip install 'gpt_dist[dev]'")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    tokenizer = load_tokenizer("gpt2")
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    exported = tmp_path / "exported"
    export_hf(model, tokenizer, exported, torch.float32)
    server = start(http_port=0)

    async def use(inner: Server) -> None:
        inner.use(loaded(Decoder(model, max_slots=8, dtype="fp32"), tokenizer))

    server.call(use(server.server))
    package = Path(lm_eval.__file__).parent / "tasks"
    rows = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "task.yaml").write_text(TASK.format(package=package, rows=rows), encoding="utf-8")
    os.environ.setdefault("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def scores(harness: Any) -> tuple[dict[str, float], list[list[float]]]:
        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=["our_hellaswag"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
        metrics = found["results"]["our_hellaswag"]
        samples = sorted(found["samples"]["our_hellaswag"], key=lambda sample: sample["doc_id"])
        likelihoods = [[response[0] for response in s["filtered_resps"]] for s in samples]
        return {name: metrics[f"{name},none"] for name in ("acc", "acc_norm")}, likelihoods

    asked, over_http = scores(served_by(LocalCompletionsAPI, server, exported))
    expected, in_process = scores(HFLM(pretrained=str(exported), device="cpu", batch_size=8))
    assert len(over_http) == ROWS
    assert asked == expected
    torch.testing.assert_close(
        torch.tensor(over_http), torch.tensor(in_process), atol=1e-3, rtol=1e-4
    )


def served_by(kind: Any, server: LiveServer, tokenizer: Path) -> Any:
    """The harness's client of a server."""
    return kind(
        base_url=f"{url(server)}/v1/completions", model="gpt2", tokenizer=str(tokenizer),
        tokenizer_backend="huggingface", batch_size=8, num_concurrent=2, max_length=128,
    )  # fmt: skip
