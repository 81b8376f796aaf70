"""Step time and memory on paper: arithmetic, links, overlap; checked against published runs.

One optimizer step is: the passes over this rank's tokens, the part of the gradient exchange that
nothing hides, and AdamW. Gradients of a bucket travel while the backward pass of the last
micro-batch computes the next ones; the tied embedding's gradient is complete only at its very end,
so that bucket is always exposed. A ring all-reduce sends 2 (n - 1) / n of the gradient out of every
rank; between nodes the ring crosses each node's network once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gpt_dist.config.command_line import build, presets, read_config_file
from gpt_dist.config.settings import Config
from gpt_dist.model.gpt import GPT
from gpt_dist.ops.loss import CHUNK_BYTES
from gpt_dist.training.dry_run import activation_bytes


@dataclass(frozen=True)
class Cluster:
    """What the computation needs to know of the hardware."""

    name: str
    peak: float
    """Dense bf16 FLOP/s of a GPU."""
    mfu: float
    """Share of the peak that one node reaches on this model (published, see below)."""
    nvlink: float
    """Bytes/s out of one GPU to its neighbours in the node, one direction."""
    network: float
    """Bytes/s out of a node, all adapters, one direction."""
    memory: float
    """Bytes/s of a GPU's memory."""
    efficiency: float = 0.8
    """Share of a link's speed that large NCCL messages reach."""
    hop: float = 10e-6
    """Seconds that one message takes between nodes, however small."""


GBIT = 1e9 / 8
A100 = Cluster("A100, 1600 Gb/s a node", 312e12, 0.43, 300e9, 1600 * GBIT, 1.5e12)
CLUSTERS = [
    Cluster("H100, 3200 Gb/s a node", 989e12, 0.40, 450e9, 3200 * GBIT, 3.3e12),
    A100,
    Cluster("A100, 100 Gb/s a node", 312e12, 0.43, 300e9, 100 * GBIT, 1.5e12),
    Cluster("A100, 25 Gb/s a node", 312e12, 0.43, 300e9, 25 * GBIT, 1.5e12),
]

BUCKETS = 20
"""DDP's buckets of 25 MiB for 124M parameters in fp32."""

PUBLISHED = {8: 136334, 16: 130535, 32: 127122, 64: 125234, 128: 123936}
"""GPUs → tokens/s of each: MPT-125M, sequence 2048, 26 sequences on a GPU, FSDP in bf16, A100 40 GB
with 1600 Gb/s a node (github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md). Three
micro-batches make a step on 8 GPUs, one on all others."""

PUBLISHED_TOKENS = 26 * 2048


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds to sum ``size`` bytes over all GPUs, eight to a node.

    Latency is a tree's, up and down, as NCCL chooses it where rings grow long.
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
    """Seconds of one optimizer step."""

    compute: float
    exchange: float
    """All-reduce of all gradients."""
    exposed: float
    """The part of it that nothing hides."""
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update


def step_time(
    gpus: int, tokens: float, cluster: Cluster, model: GPT, *, micro_steps: float = 1
) -> Step:
    """One step in which each GPU sees ``tokens`` in ``micro_steps`` passes."""
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
    """A preset's model, without memory for its weights."""
    data = read_config_file(name)
    data["model"] = data["model"] | {"vocab_size": 50257} | changes
    with torch.device("meta"):
        return GPT(build(data).model)


def published_check() -> tuple[float, dict[int, tuple[float, float]]]:
    """The computation against the published runs.

    Returns:
        What one doubling of the GPUs costs beyond the computation, as a fraction of the step, from
        the published runs with equal steps (16 to 128 GPUs); and by number of GPUs the published
        and the computed share of the speed of 8 GPUs.
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
        "Check: share of the speed of 8 GPUs that remains (MPT-125M, A100, published).",
        "",
        f"| GPUs | published | volume, links, overlap | with {penalty:.1%} a doubling |",
        "|---|---|---|---|",
    ]
    for gpus, (published, computed) in shares.items():
        corrected = computed / (1 + penalty * math.log2(gpus / 8))
        lines.append(f"| {gpus} | {published:.1%} | {computed:.1%} | {corrected:.1%} |")
    sizes = [8 << k for k in range(8)]
    model = gpt2()
    for title, tokens_of in (
        ("524,288 tokens a step (the paper's batch)", lambda gpus: 524288 / gpus),
        ("65,536 tokens a GPU and step", lambda gpus: 65536.0),
    ):
        lines += ["", f"GPT-2 124M, DDP, {title}: milliseconds a step, tokens/s, efficiency.", ""]
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
    """Seconds a step, with what published runs lose beyond the computation."""
    micro_steps = max(1.0, tokens / 65536)
    step = step_time(gpus, tokens, cluster, model, micro_steps=micro_steps)
    return step.total * (1 + penalty * math.log2(gpus / 8))


def memory_report(ranks: int = 8) -> str:
    """Gigabytes on each of 8 GPUs, by preset and strategy, as Markdown."""
    lines = [
        f"| preset | parameters | activations | DDP | ZeRO-1, {ranks} GPUs | ZeRO-2 | ZeRO-3 |",
        "|---|---|---|---|---|---|---|",
    ]
    models = {name: gpt2(name) for name in presets() if name.startswith("gpt2-")}
    for name, model in sorted(models.items(), key=lambda item: item[1].num_parameters()):
        config: Config = build(read_config_file(name))
        parameters = model.num_parameters()
        micro_batch, _ = config.micro_batch(ranks)
        # The output head works on one chunk of logits at a time.
        activations = activation_bytes(config, micro_batch) + CHUNK_BYTES
        cells = [f"{parameters / 1e6:,.0f}M", f"{activations / 1e9:.1f}"]
        for weights, gradients, optimizer in (
            (1, 1, 1), (1, 1, ranks), (1, ranks, ranks), (ranks, ranks, ranks),
        ):  # fmt: skip
            state = parameters * (4 / weights + 4 / gradients + 8 / optimizer)
            cells.append(f"{(state + activations) / 1e9:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
