"""Whether the memory of one rank fits its device, and the cheapest changes that make it fit."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from gpt_dist.config.settings import Config
from gpt_dist.training.plan.facts import Plan
from gpt_dist.training.plan.memory import Part, device_bytes, memory_parts, zero_stage
from gpt_dist.training.plan.rows import Row, column
from gpt_dist.training.reporting.formatting import file_size


def memory_rows(plan: Plan) -> list[Row]:
    """A row for each part of the memory, their sum, and whether it fits."""
    parts = parts_of(plan, plan.config)
    dtype = "bf16" if plan.low_precision else "fp32"
    title = f"{strategy(plan.config)}, {plan.config.optim.name}, {dtype}"
    here = [part for part in parts if not part.on_host]
    host = [part for part in parts if part.on_host]
    rows = [Row("memory", f"of each rank: {title}"), *table(here), *verdict(plan, here)]
    if host:
        rows += [Row("host memory", f"for each rank: {title}"), *table(host)]
    sources = "N parameters, R ranks; arXiv:1910.02054 (ZeRO), arXiv:2205.05198 (activations)"
    return [*rows, Row("", sources)]


def strategy(config: Config) -> str:
    """``DDP``, ``ZeRO-2``, ``ZeRO-3 with offload``."""
    if config.parallel.strategy == "ddp":
        return "DDP"
    offload = " with offload" if config.parallel.offload else ""
    return f"ZeRO-{config.parallel.zero_stage}{offload}"


def table(parts: list[Part]) -> list[Row]:
    """A row for each part, and their sum."""
    sizes = [part.size for part in parts]
    *shown, total = column([*sizes, sum(sizes)])
    rows = [
        Row("", f"  {part.name:<17}{size:>10}   {part.formula}")
        for part, size in zip(parts, shown, strict=True)
    ]
    return [*rows, Row("", f"  {'in all':<17}{total:>10}")]


def parts_of(plan: Plan, config: Config) -> list[Part]:
    """The memory of one rank with another configuration."""
    return memory_parts(
        plan.model,
        config,
        plan.ranks,
        low_precision=plan.low_precision,
        gpu=plan.device.type == "cuda",
    )


def verdict(plan: Plan, parts: list[Part]) -> list[Row]:
    """Whether it fits, and what would."""
    room, where = device_memory(plan)
    if room is None:
        return [Row("", "no GPU here to compare with; name its memory: --device-memory 80GB")]
    if device_bytes(parts) <= room:
        return [Row("", f"fits {where}")]
    fitting = next((flags for flags, size in changes(plan) if size <= room), None)
    if fitting is None:
        split = f", however it is split over {plan.ranks} ranks" if plan.ranks > 1 else ""
        return [Row("", f"DOES NOT FIT {where}{split}")]
    return [Row("", f"DOES NOT FIT {where}; this does:"), *(Row("", f"  {f}") for f in fitting)]


def device_memory(plan: Plan) -> tuple[float | None, str]:
    """Memory for one rank in bytes, None where unknown, and whose it is."""
    if plan.options.device_memory:
        return plan.options.device_memory, f"the {file_size(plan.options.device_memory)} named"
    if plan.device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.total_memory, f"{file_size(properties.total_memory)} ({properties.name})"
    if plan.device.type == "cpu":
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        shared = f", shared by {plan.ranks} ranks" if plan.ranks > 1 else ""
        return size / plan.ranks, f"this machine's {file_size(size)}{shared}"
    return None, ""


def changes(plan: Plan) -> Iterator[tuple[list[str], float]]:
    """Flags that save memory, the cheapest first, and the memory of the device with them."""
    for flags, config in strategies(plan):
        micro_batch, _ = config.micro_batch(plan.ranks)
        size = micro_batch
        while size >= 1:
            train = config.train.model_copy(update={"micro_batch_size": size})
            smaller = config.model_copy(update={"train": train})
            more = [f"--train.micro_batch_size {size}"] if size < micro_batch else []
            yield [*flags, *more], device_bytes(parts_of(plan, smaller))
            size //= 2


def strategies(plan: Plan) -> Iterator[tuple[list[str], Config]]:
    """Flags and configuration of ways to share the model, the cheapest first."""
    config = plan.config
    checkpointing = config.model.model_copy(update={"activation_checkpointing": True})
    stages = [1, 2, 3] if plan.ranks > 1 else []
    now = zero_stage(config)
    for recompute in (False, True):
        flags = ["--model.activation_checkpointing true"] if recompute else []
        base = config.model_copy(update={"model": checkpointing}) if recompute else config
        yield flags, base
        for stage in (stage for stage in stages if stage > now):
            yield [*flags, *zero_flags(stage)], with_zero(base, stage)
        if stages and recompute:
            yield [*flags, *zero_flags(3), "--parallel.offload true"], with_zero(base, 3, True)


def zero_flags(stage: int) -> list[str]:
    return ["--parallel.strategy deepspeed", f"--parallel.zero_stage {stage}"]


def with_zero(config: Config, stage: int, offload: bool = False) -> Config:
    update = {"strategy": "deepspeed", "zero_stage": stage, "offload": offload}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})
