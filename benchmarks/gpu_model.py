"""What a training step and a decoding step of GPT-2 124M cost on a GPU, computed.

    python benchmarks/gpu_model.py

Nothing is measured here. Each part of a step is a number of FLOPs or of bytes a token; a GPU has a
speed for each. The same rules put llm.c, with its own operations, beside its published speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from flags import benchmark_parser

LAYERS, WIDTH, CONTEXT, VOCABULARY = 12, 768, 1024, 50304
PARAMETERS = 124e6
BLOCKS = LAYERS * 12 * WIDTH * WIDTH
"""Parameters of the matrices of the blocks."""

STEP = 524288
"""Tokens of an optimizer step of the preset, on one GPU."""


@dataclass(frozen=True)
class Gpu:
    """Figures of a GPU, as measured on rented machines."""

    name: str
    matmul: float
    """FLOP/s of a large product of random bf16 matrices."""
    copy: float
    """Bytes/s of a copy, reads and writes counted."""


H100 = Gpu("H100", 780e12, 3.0e12)
H200 = Gpu("H200", 785e12, 4.3e12)

GEMM = 0.80
"""Share of a large product's speed that those of this width reach, the backward pass's included."""
ATTENTION = 265e12
"""FLOP/s of fused attention, forward and backward, at this length and head size, causal FLOPs."""
POINTWISE = 0.85
"""Share of a copy's speed that fused elementwise kernels and norms reach."""
GAP = 3e-6
"""Seconds between two kernels, their first and last waves included."""

PUBLISHED = 468_000
"""Tokens/s of llm.c on one H100 (of eight), 124M parameters, context 1,024."""


@dataclass(frozen=True)
class Trainer:
    """How a trainer computes a step."""

    name: str
    micro_batch: int
    residual: int
    """Bytes of an element of the residual stream."""
    extra: float = 0.0
    """Bytes a token besides, such as an unfused loss."""
    fp32_weights: bool = True
    """Whether weights are cast in each micro-batch, and gradients are summed in fp32."""

    def parts(self, gpu: Gpu) -> dict[str, float]:
        """Part → nanoseconds a token."""
        tokens, low, r = self.micro_batch * CONTEXT, 2, self.residual
        memory = gpu.copy * POINTWISE
        # A layer, in elements of the width: two additions with a norm, and the GELU.
        forward = 2 * (2 * r + 2 * low) + 8 * low
        # Two norms' gradients with the residual's and those of their weights, the GELU's, biases'.
        backward = 2 * (2 * low + 3 * r) + 2 * (low + r) + 12 * low + 9 * low
        pointwise = LAYERS * WIDTH * (forward + backward)
        loss = 2 * low * VOCABULARY
        per_pass = PARAMETERS * (6 + 4) + BLOCKS * 14 if self.fp32_weights else PARAMETERS * 6
        once = PARAMETERS * (28 + 4)
        kernels = LAYERS * 23 + 25
        seconds = {
            "matrix products of the blocks": 6 * BLOCKS / (gpu.matmul * GEMM),
            "matrix products of the head": 6 * WIDTH * VOCABULARY / (gpu.matmul * GEMM),
            "attention": 7 * LAYERS * CONTEXT * WIDTH / ATTENTION,
            "norms, additions, GELU, biases": pointwise / memory,
            "cross-entropy": (loss + self.extra) / memory,
            "embeddings": 10 * 4 * WIDTH / memory,
            "casts of weights, sums of gradients": per_pass / tokens / memory,
            "optimizer": once / STEP / memory,
            "between kernels": kernels * GAP / tokens,
        }
        return {name: 1e9 * value for name, value in seconds.items()}

    def speed(self, gpu: Gpu) -> float:
        """Tokens/s."""
        return 1e9 / sum(self.parts(gpu).values())


OURS = Trainer("fp32 residual, 16 sequences", 16, 4)
LOW = Trainer("bf16 residual, 32 sequences", 32, 2)
# Ten passes over fp32 logits, as PyTorch's cross-entropy in chunks made them.
BEFORE = Trainer("before: eager cross-entropy", 16, 4, extra=2.3e6)
LLMC = Trainer("llm.c", 64, 2, fp32_weights=False)


def decoding(gpu: Gpu, batch: int, length: int) -> dict[str, float]:
    """Part → milliseconds of a decoding step in bf16, as one CUDA graph."""
    weights = 2 * (BLOCKS + VOCABULARY * WIDTH)
    cache = 2 * 2 * LAYERS * WIDTH * length * batch
    kernels = 116 if batch * 12 < 264 else 104
    # Inside a graph a small kernel takes about two microseconds, most of which is its start.
    seconds = {
        "weights": weights / (0.9 * gpu.copy),
        "keys and values": cache / (0.7 * gpu.copy),
        "logits": 3 * 4 * VOCABULARY * batch / (0.7 * gpu.copy) + 40e-6,
        "starts of kernels": kernels * 1.5e-6,
        "host": 60e-6,
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def training_table() -> str:
    """The cost of a training step, as Markdown."""
    columns = [(BEFORE, H200), (OURS, H200), (LOW, H200), (LOW, H100), (LLMC, H100)]
    lines = [
        "| ns a token | " + " | ".join(f"{t.name}, {g.name}" for t, g in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for part in OURS.parts(H200):
        cells = [f"{t.parts(g)[part]:,.0f}" for t, g in columns]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    lines.append(
        "| tokens/s | " + " | ".join(f"{round(t.speed(g), -3):,.0f}" for t, g in columns) + " |"
    )
    return "\n".join(lines)


def decoding_table() -> str:
    """The cost of a decoding step, as Markdown."""
    columns = [(1, 256), (8, 256), (64, 256), (64, 1024), (256, 256)]
    steps = [decoding(H200, *column) for column in columns]
    lines = [
        "| ms a step, H200 | " + " | ".join(f"batch {b}, length {n}" for b, n in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for part in steps[0]:
        lines.append(f"| {part} | " + " | ".join(f"{step[part]:.2f}" for step in steps) + " |")
    sums = [sum(step.values()) for step in steps]
    lines.append("| all | " + " | ".join(f"{each:.2f}" for each in sums) + " |")
    speeds = [b / each * 1e3 for (b, _), each in zip(columns, sums, strict=True)]
    lines.append("| tokens/s | " + " | ".join(f"{round(s, -2):,.0f}" for s in speeds) + " |")
    return "\n".join(lines)


def main() -> None:
    benchmark_parser(__file__, __doc__).parse_args()
    print(training_table(), decoding_table(), sep="\n\n")
    computed = LLMC.speed(H100)
    print(
        f"\nllm.c on one H100: {round(computed, -3):,.0f} tokens/s computed, {PUBLISHED:,} "
        f"published ({computed / PUBLISHED - 1:+.0%})"
    )


if __name__ == "__main__":
    main()
