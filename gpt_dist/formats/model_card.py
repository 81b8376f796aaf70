"""The README.md of an exported model: what it is, its scores, how to use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from gpt_dist.model.gpt import GPT
    from gpt_dist.text.tokenizers import Tokenizer

FIGURES = [
    ("train_loss", "training loss (nats per token)", "{:.4f}"),
    ("val_loss", "validation loss (nats per token)", "{:.4f}"),
    ("val_bpb", "validation bits per byte", "{:.4f}"),
    ("hellaswag_acc_norm", "HellaSwag, completion style (acc_norm)", "{:.4f}"),
]


def model_card(
    model: GPT, tokenizer: Tokenizer, name: str, hf_config: dict[str, Any], figures: dict[str, Any]
) -> str:
    """Markdown with the YAML header that the hub reads.

    Args:
        model: the exported model.
        tokenizer: its tokenizer.
        name: title of the page.
        hf_config: contents of config.json.
        figures: from ``gpt_dist.export.run_figures``; missing ones are left out.
    """
    config = model.config
    architecture = hf_config["architectures"][0]
    norms = f" ({config.norm}-LN)" if config.parts.norm == "layer" else ""
    rows = [
        ("architecture", f"`{architecture}`{norms}"),
        ("parameters", f"{model.num_parameters():,}"),
        ("layers / heads / width", f"{config.n_layer} / {config.n_head} / {config.n_embd}"),
        ("context", f"{config.context_length:,} tokens"),
        ("vocabulary", f"{tokenizer.vocab_size:,} tokens, {tokenizer.name} tokenizer"),
    ]
    run = figures.get("config", {})
    if "step" in figures:
        rows.append(("steps", f"{figures['step']:,}"))
    if "tokens" in figures:
        rows.append(("tokens seen", f"{figures['tokens']:,}"))
    if "data" in run:
        rows.append(("data", ", ".join(f"`{path}`" for path in run["data"]["path"])))
    rows += [(text, form.format(figures[key])) for key, text, form in FIGURES if key in figures]
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [hf_config["model_type"], "causal-lm", "gpt_dist"],
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    notes = ""
    if "gpt_dist" in hf_config and (not config.bias or config.qkv_bias is False):
        notes += "The trained model lacks some biases; they are stored as zeros.\n\n"
    if tokenizer.name == "char":
        notes += "Each token is one character. A prompt may contain only characters of the "
        notes += "training text; others have no id.\n\n"
    settings = ""
    if "train" in run:
        settings = (
            f"\n## Settings of the run\n\n```yaml\n{yaml.safe_dump(run, sort_keys=False)}```\n"
        )
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# {name}

A language model trained with gpt_dist.

| | |
|---|---|
{table}

{notes}## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50, do_sample=True, top_k=50)[0]))
```
{settings}"""
