"""The choice of a decoder's arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from gpt_dist.inference import cpu_kernels as kernels
from gpt_dist.inference.cpu_backend import CpuBackend
from gpt_dist.inference.cuda_backend import CudaBackend
from gpt_dist.inference.results import Chunk
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.inference.torch_backend import TorchBackend
from gpt_dist.model.gpt import GPT
from gpt_dist.ops import triton

DType = Literal["auto", "fp32", "bf16", "int8"]
Ids = Sequence[int] | np.ndarray


class Backend(Protocol):
    """A decoder's arithmetic; `gpt_dist.inference.torch_backend.TorchBackend` documents it."""

    name: str
    cache_bytes: int
    rows_at_once: int
    """Maximum number of rows of a step with guesses; 0 if it cannot verify any."""

    def load(self, model: GPT) -> Any: ...
    def set(self, slot: int, params: SamplingParams, ids: Ids, generated: int = 0) -> None: ...
    def slide(self, slot: int, dropped: int) -> None: ...
    def rows(self, highest: int) -> int: ...
    def copy(self, source: int, target: int, length: int) -> None: ...
    def prefill(self, weights: Any, chunks: Sequence[Chunk]) -> None: ...
    def logits(self, weights: Any, chunk: Chunk) -> Tensor: ...
    def step(
        self, weights: Any, slots: np.ndarray, ids: np.ndarray, positions: np.ndarray,
        lengths: np.ndarray, generated: np.ndarray,
    ) -> list[np.ndarray]: ...  # fmt: skip


def resolve_dtype(dtype: DType, device: torch.device) -> str:
    """What "auto" means on a device: bf16 where it makes decoding faster, else fp32."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type != "cpu":
        return "fp32"
    # bf16 halves the bytes that a step reads. The kernels compute as fast as in fp32, also on AVX2:
    # 1.6, 1.6 and 1.2 times the tokens of fp32 at batch 1, 8 and 32 (124M, 2 cores). PyTorch's own
    # bf16 is slower than its fp32 without AVX-512 BF16.
    fast = kernels.decoder_library() is not None or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def make_backend(
    model: GPT, slots: int, context: int, device: torch.device, dtype: str, deterministic: bool
) -> Backend:
    """The fastest backend on this machine for the device."""
    small = model.config.head_size <= kernels.MAX_HEAD_SIZE
    if device.type == "cpu" and small and kernels.decoder_library() is not None:
        return CpuBackend(model, slots, context, dtype)
    if device.type == "cuda" and triton.available():
        return CudaBackend(model, slots, context, device, dtype, deterministic)
    return TorchBackend(model, slots, context, device, dtype, deterministic)
