"""The model, the data, the steps and the time they take."""

from __future__ import annotations

import torch

from gpt_dist.parallel.engine import pick_dtype
from gpt_dist.training.plan.facts import Plan
from gpt_dist.training.plan.rows import Row
from gpt_dist.training.reporting.formatting import counted, human
from gpt_dist.training.reporting.throughput import PEAK_TFLOPS, peak_flops

DEFAULT_MFU = 0.4
"""What well-tuned trainers of this size reach on one node."""

USUAL = ("H100", "A100")
"""GPUs to tell the time for where there is none."""


def model_rows(plan: Plan) -> list[Row]:
    """Parameters and shape."""
    model = plan.config.model
    fewer = f" ({model.kv_heads} of keys and values)" if model.kv_heads < model.n_head else ""
    shape = (
        f"{model.architecture}, {counted(model.n_layer, 'layer')}, "
        f"{counted(model.n_head, 'head')}{fewer}, "
        f"width {model.n_embd}, context {model.context_length:,}, "
        f"vocabulary {model.vocab_size:,} ({plan.vocabulary})"
    )
    without = plan.model.num_parameters(embeddings=False)
    return [
        Row("parameters", f"N = {plan.parameters:,} ({without:,} multiplied)"),
        Row("model", shape),
    ]


def data_rows(plan: Plan) -> list[Row]:
    """Each data set: its share of the mixture, its size, and what the run takes of it."""
    context, stride = plan.config.model.context_length, plan.config.stride
    rows = [Row("data", f"{'weight':>6}{'train':>7}{'val':>7}{'taken':>7}{'epochs':>7}  tokens")]
    for part in plan.parts:
        taken = epochs = None
        if plan.steps is not None:
            sequences = plan.steps * plan.config.batch_sequences * part.share
            taken = sequences * context
            epochs = sequences / part.windows if part.windows else None
        cells = [count(number) for number in (part.tokens, part.validation, taken)]
        cells.append("-" if epochs is None else f"{epochs:.2f}")
        text = "".join(f"{cell:>7}" for cell in cells)
        rows.append(Row("", f"{part.share:>6.1%}{text}  {part.directory}"))
        if plan.config.data.rows == "documents" and part.windows and part.tokens:
            kept = part.windows * (context + 1) / part.tokens
            rows.append(Row("", f"its rows of documents hold {kept:.0%} of the training tokens"))
    if stride < context:
        rows.append(
            Row(
                "",
                f"windows of {counted(context, 'token')} start every {counted(stride, 'token')}, "
                f"so an epoch reads each token {context / stride:.3g} times",
            )
        )
    if plan.windows and not any(part.validation for part in plan.parts):
        rows.append(Row("", "no validation data: no validation loss, and no best checkpoint by it"))
    return rows


def count(number: float | None) -> str:
    """Tokens for a column."""
    return "-" if number is None else human(number)


def step_rows(plan: Plan) -> list[Row]:
    """Steps, tokens and arithmetic."""
    config = plan.config
    micro_batch, accumulation = config.micro_batch(plan.ranks)
    one = (
        f"{config.train.batch_tokens:,} tokens = {counted(plan.ranks, 'rank')} × "
        f"{counted(accumulation, 'micro-batch')} × {counted(micro_batch, 'sequence')} × "
        f"{config.model.context_length:,}"
    )
    if plan.steps is None:
        length = f"{config.train.epochs:g} times its length"
        return [Row("step", one), Row("steps", f"unknown without the data: {length}")]
    tokens = plan.steps * config.train.batch_tokens
    return [
        Row("step", one),
        Row("steps", f"{plan.steps:,} ({human(tokens)} tokens)"),
        Row("compute", f"{tokens * plan.model.flops_per_token():.3g} FLOPs"),
    ]


def time_rows(plan: Plan) -> list[Row]:
    """How long the steps that are left take, by device."""
    if plan.steps is None:
        return []
    done = plan.start.state["step"] if plan.start else 0
    flops = (
        max(0, plan.steps - done) * plan.config.train.batch_tokens * plan.model.flops_per_token()
    )
    mfu = plan.options.mfu or DEFAULT_MFU
    devices = [
        f"{duration(flops / (peak * mfu * count))} on {counted(count, name)}"
        for name, peak, count in peaks(plan)
    ]
    if not devices:
        return []
    assumed = "" if plan.options.mfu else " (see --mfu)"
    return [Row("time", f"{', '.join(devices)} at {mfu * 100:.3g}% of peak{assumed}")]


def peaks(plan: Plan) -> list[tuple[str, float, int]]:
    """Devices that the run may have: name, peak FLOP/s, how many of them."""
    gpus = [(name, PEAK_TFLOPS[name] * 1e12, plan.ranks) for name in USUAL]
    if plan.device.type == "cpu":  # the ranks share it
        dtype = pick_dtype(plan.config.train.precision, plan.device)
        peak = peak_flops(plan.device, dtype)
        here = [("CPU", peak, 1)] if peak else []
        return here if plan.config.device == "cpu" else here + gpus
    if plan.device.type != "cuda":
        return []
    if torch.cuda.is_available() and not plan.options.device_memory:
        peak = peak_flops(plan.device, torch.bfloat16)
        return [(torch.cuda.get_device_name(plan.device), peak, plan.ranks)] if peak else []
    return gpus


def duration(seconds: float) -> str:
    """5400 → ``1.5 h``."""
    days = seconds / 86400
    if days >= 2:
        return f"{days:,.0f} days" if days >= 100 else f"{days:.3g} days"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
