"""The Triton kernel of the loss: exact, no spilled registers, the least bytes, the least memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gpt_dist.ops import cross_entropy, linear_cross_entropy
from tests.gpu.conftest import Found
from tests.gpu.fake import Watch, fake_cuda
from tests.gpu.kernels import CAPABILITIES, resources


@pytest.mark.slow(20)
def test_equals_float64(interpreted: Found) -> None:
    """Vocabularies that do and do not divide, one row, ignored rows, a cap; in bf16 and fp32."""
    cases = {name: found for name, found in interpreted.items() if name.startswith("entropy")}
    assert len(cases) == 12
    for name, found in cases.items():
        assert found["loss"] < 1e-5, name
        assert found["gradient"] <= 1, name
        assert found["padding"] == found["ignored"] == 0, name


@pytest.mark.slow(20)
def test_reads_once_and_writes_once(interpreted: Found) -> None:
    for vocabulary in ("50257 3", "65 5", "4096 4"):
        (found,) = (v for k, v in interpreted.items() if k.startswith(f"entropy {vocabulary} b"))
        assert found["bytes"] < 1.01
    assert 1.49 < interpreted["entropy 60000 2 bfloat16 1"]["bytes"] < 1.51


@pytest.mark.slow(6)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("columns", "classes", "dtype", "cap"),
    [
        (50304, 50257, "bf16", 0.0),
        (50304, 50257, "bf16", 15.0),
        (128, 65, "bf16", 0.0),
        (40960, 40950, "bf16", 15.0),
        (60032, 60000, "bf16", 0.0),
        (25600, 25600, "fp32", 0.0),
    ],
)
def test_compiles_without_spilling(
    columns: int, classes: int, dtype: str, cap: float, capability: int
) -> None:
    from gpt_dist.ops.triton.cross_entropy import variant

    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    kernel, sizes, warps = variant(columns, kinds[dtype], cap)
    found = resources(
        kernel,
        {"logits": f"*{dtype}", "targets": "*i64", "losses": "*fp32"},
        {"COLUMNS": columns, "CLASSES": classes, "CAP": cap, **sizes},
        {"num_warps": warps},
        capability,
    )
    assert found.stack == found.local == 0


@pytest.mark.slow(5)
@pytest.mark.parametrize("chunks", [1, 4])
def test_memory(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 sequences of GPT-2: a chunk of logits, the gradients, and the inputs in bf16.

    Of several chunks also the head in bf16; it is dropped before the last chunk's product makes
    its gradient.
    """
    rows, width, padded = 16 * 1024, 768, 50304
    chunk = rows // chunks * padded * 2
    monkeypatch.setattr(cross_entropy, "chunk_bytes", lambda device: chunk)
    # The forward pass computes the gradients too. Autograd itself would ask for a GPU.
    context = SimpleNamespace(needs_input_grad=(True, True), save_for_backward=lambda *kept: None)
    with fake_cuda() as device, device:
        hidden, weight = torch.empty(rows, width), torch.empty(padded, width)
        targets = torch.empty(rows, dtype=torch.int64)
        with Watch() as watch:
            cross_entropy._LinearCrossEntropy.forward(
                context, hidden, weight, targets, 50257, 0.0, torch.bfloat16, True, False
            )
    inputs = 2 * hidden.numel() // chunks + 2 * weight.numel() * (chunks > 1)
    gradients = 2 * hidden.numel() + 4 * weight.numel()
    assert chunk + gradients < watch.peak
    assert watch.peak <= 1.001 * (chunk + gradients + inputs)


def test_chunks_are_few_and_equal() -> None:
    row = 50304 * 2
    assert cross_entropy.chunk_rows(16 * 1024, row, 1 << 32) == 16 * 1024
    assert cross_entropy.chunk_rows(64 * 1024, row, 1 << 32) == 32 * 1024
    assert cross_entropy.chunk_rows(3, row, 1) == 1
    assert cross_entropy.chunk_rows(0, row, 1) == 1
    assert linear_cross_entropy(
        torch.empty(0, 4), torch.ones(8, 4), torch.empty(0, dtype=torch.int64), 8
    ).item() == 0  # fmt: skip
