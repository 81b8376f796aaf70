"""Computed step time and memory: arithmetic, links and overlap, checked against published runs.

The time of an optimizer step is the forward and backward passes, plus the exposed part of the
gradient exchange, plus AdamW. The gradients of one bucket travel while the backward pass of the
last micro-batch computes the next. The gradient of the tied embedding is complete only at the end
of that pass, so its bucket is always exposed. A ring all-reduce sends 2 (n - 1) / n of the gradient
out of each rank; between nodes the ring crosses the network of each node once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gpt_dist.config.command_line import build, presets, read_config_file
from gpt_dist.config.settings import Config
from gpt_dist.model.gpt import GPT
from gpt_dist.training.plan.fitting import with_zero
from gpt_dist.training.plan.memory import device_bytes, memory_parts, pass_parts


@dataclass(frozen=True)
class Cluster:
    """The figures of the hardware."""

    name: str
    peak: float
    """Dense bf16 FLOP/s of one GPU."""
    mfu: float
    """Share of the peak that one node reaches on this model (published figures)."""
    nvlink: float
    """Bytes/s from one GPU to the others in its node, one direction."""
    network: float
    """Bytes/s from a node to others, all adapters together, one direction."""
    memory: float
    """Bytes/s of the memory of one GPU."""
    efficiency: float = 0.8
    """Share of the speed of a link that large NCCL messages reach."""
    hop: float = 10e-6
    """Latency of a message between nodes, in seconds."""


GBIT = 1e9 / 8
A100 = Cluster("A100, 1600 Gb/s per node", 312e12, 0.43, 300e9, 1600 * GBIT, 1.5e12)
CLUSTERS = [
    Cluster("H100, 3200 Gb/s per node", 989e12, 0.40, 450e9, 3200 * GBIT, 3.3e12),
    A100,
    Cluster("A100, 100 Gb/s per node", 312e12, 0.43, 300e9, 100 * GBIT, 1.5e12),
    Cluster("A100, 25 Gb/s per node", 312e12, 0.43, 300e9, 25 * GBIT, 1.5e12),
]

BUCKETS = 20
"""DDP's buckets of 25 MiB for 124M parameters in fp32."""

PUBLISHED = {8: 136334, 16: 130535, 32: 127122, 64: 125234, 128: 123936}
"""GPUs → tokens/s per GPU: MPT-125M, context 2048, 26 sequences per GPU, FSDP in bf16, A100 40 GB,
1600 Gb/s per node (github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md). A step
is three micro-batches on 8 GPUs and one on all others."""

PUBLISHED_TOKENS = 26 * 2048


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds to all-reduce ``size`` bytes over all GPUs, eight per node.

    The latency is that of a tree, up and down; NCCL chooses trees where rings would be long.
    """
    nodes = max(1, gpus // 8)
    volume = 2 * (gpus - 1) / gpus * size
    seconds = volume / (cluster.nvlink * cluster.efficiency)
    if nodes > 1:
        between = volume / (cluster.network * cluster.efficiency)
        seconds = max(seconds, between) + 2 * math.log2(nodes) * cluster.hop
    return seconds


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by part."""

    compute: float
    exchange: float
    """All-reduce of all gradients."""
    exposed: float
    """The part of it that the backward pass does not hide."""
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update


def step_time(
    gpus: int, tokens: float, cluster: Cluster, model: GPT, *, micro_steps: float = 1
) -> Step:
    """The time of a step in which each GPU processes ``tokens`` in ``micro_steps`` passes."""
    parameters = model.num_parameters()
    gradient = 4.0 * parameters
    embedding = 4.0 * model.vocab_size * model.config.n_embd
    compute = tokens * model.flops_per_token() / (cluster.peak * cluster.mfu)
    backward = compute / micro_steps * 2 / 3
    bucket = all_reduce(gradient / BUCKETS, gpus, cluster)
    last = all_reduce(embedding, gpus, cluster)
    exchange = bucket * BUCKETS
    exposed = max(last, exchange - backward)
    # AdamW reads weight, gradient and two moments and writes three of them back.
    return Step(compute, exchange, exposed, 7 * gradient / cluster.memory)


def gpt2(name: str = "gpt2-124m", **changes: int) -> GPT:
    """The model of a preset, on the meta device."""
    data = read_config_file(name)
    data["model"] = data["model"] | {"vocab_size": 50257} | changes
    with torch.device("meta"):
        return GPT(build(data).model)


def published_check() -> tuple[float, dict[int, tuple[float, float]]]:
    """Compare the computation with the published runs.

    Returns:
        The fraction of a step by which one doubling of the GPUs costs more than computed (16 to 128
        GPUs, where the published steps are alike); and for each number of GPUs the published and
        the computed share of the speed of 8 GPUs.
    """
    model = gpt2(context_length=2048)
    totals = {
        gpus: step_time(gpus, PUBLISHED_TOKENS, A100, model, micro_steps=1).total
        for gpus in PUBLISHED
    }
    three = step_time(8, 3 * PUBLISHED_TOKENS, A100, model, micro_steps=3).total / 3
    shares = {
        gpus: (PUBLISHED[gpus] / PUBLISHED[8], three / total) for gpus, total in totals.items()
    }
    shares[8] = (1.0, 1.0)
    doublings = math.log2(128 / 16)
    published = PUBLISHED[16] / PUBLISHED[128]
    computed = totals[128] / totals[16]
    return (published / computed - 1) / doublings, shares


def report() -> str:
    """The tables, as Markdown."""
    penalty, shares = published_check()
    lines = [
        "Speed of each GPU relative to 8 GPUs (MPT-125M on A100).",
        "",
        f"| GPUs | published | computed | computed, minus {penalty:.1%} per doubling |",
        "|---|---|---|---|",
    ]
    for gpus, (published, computed) in shares.items():
        corrected = computed / (1 + penalty * math.log2(gpus / 8))
        lines.append(f"| {gpus} | {published:.1%} | {computed:.1%} | {corrected:.1%} |")
    sizes = [8 << k for k in range(8)]
    model = gpt2()
    for title, tokens_of in (
        ("524,288 tokens per step", lambda gpus: 524288 / gpus),
        ("65,536 tokens per GPU and step", lambda gpus: 65536.0),
    ):
        lines += ["", f"GPT-2 124M, DDP, {title}: time per step, tokens/s, efficiency.", ""]
        lines.append("| GPUs | " + " | ".join(c.name for c in CLUSTERS) + " |")
        lines.append("|---" * (len(CLUSTERS) + 1) + "|")
        for gpus in sizes:
            tokens = tokens_of(gpus)
            if tokens < 1024:  # less than one sequence
                continue
            cells = []
            for cluster in CLUSTERS:
                total = expected(gpus, tokens, cluster, model, penalty)
                speed = gpus * tokens / total
                one = 8 * tokens_of(8) / expected(8, tokens_of(8), cluster, model, penalty)
                share = speed / (one * gpus / 8)
                cells.append(f"{total * 1e3:.0f} ms, {speed / 1e6:.1f} M/s, {share:.0%}")
            lines.append(f"| {gpus} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def expected(gpus: int, tokens: float, cluster: Cluster, model: GPT, penalty: float) -> float:
    """Seconds per step, including what published runs lose beyond the computation."""
    micro_steps = max(1.0, tokens / 65536)
    step = step_time(gpus, tokens, cluster, model, micro_steps=micro_steps)
    return step.total * (1 + penalty * math.log2(gpus / 8))


def memory_report(ranks: int = 8) -> str:
    """Gigabytes per GPU, by preset and strategy, as Markdown."""
    lines = [
        f"| preset | parameters | activations | DDP | ZeRO-1, {ranks} GPUs | ZeRO-2 | ZeRO-3 |",
        "|---|---|---|---|---|---|---|",
    ]
    models = {name: gpt2(name) for name in presets() if name.startswith("gpt2-")}
    for name, model in sorted(models.items(), key=lambda item: item[1].num_parameters()):
        config: Config = build(read_config_file(name))
        activations = sum(p.size for p in pass_parts(model, config, ranks, low_precision=True))
        cells = [f"{model.num_parameters() / 1e6:,.0f}M", f"{activations / 1e9:.1f}"]
        for shared in (config, *(with_zero(config, stage) for stage in (1, 2, 3))):
            parts = memory_parts(model, shared, ranks, low_precision=True, gpu=True)
            cells.append(f"{device_bytes(parts) / 1e9:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
