"""The decoder's arithmetic on CUDA: one graph for each number of rows, recorded before serving.

A graph is the whole step: embedding, blocks, choice of the token, and the inputs of the next step.
What requests choose (lengths, sampling, penalties) is data that the graph's kernels read, so that
no request causes a recording. As long as the same sequences go on, nothing is uploaded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt_dist import ops
from gpt_dist.errors import UsageError
from gpt_dist.inference.results import Chunk
from gpt_dist.inference.sampling import log_probabilities
from gpt_dist.inference.torch_backend import Linear, TorchBackend, TorchWeights
from gpt_dist.model.gpt import GPT
from gpt_dist.ops import decode

BUCKET = 128
"""Prefill attends over a multiple of so many keys, so that kernels are planned for few shapes."""

# cuDNN plans each new shape for tens of milliseconds.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class CudaLinear(Linear):
    """A linear layer in one kernel: inputs, weights, bias and outputs in the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str, device: Any) -> None:
        super().__init__(weight, bias, dtype, device)
        self.bias = None if self.bias is None else self.bias.to(self.compute)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.compute), self.weight, self.bias)

    def wide(self, x: Tensor) -> Tensor:
        """Outputs in fp32, in which a product in bf16 sums anyway: logits must not be rounded."""
        x = x.to(self.compute)
        if self.compute == torch.float32 or x.device.type != "cuda":
            return F.linear(x.float(), self.weight.float())
        return torch.mm(x, self.weight.t(), out_dtype=torch.float32)


class CudaBackend(TorchBackend):
    """`TorchBackend` for CUDA; one thread decodes, another may load weights.

    Args:
        model: gives the shape.
        slots: rows of the cache.
        context: positions of a slot.
        device: where to run; elsewhere than on CUDA without graphs, for tests.
        dtype: "fp32" or "bf16".
        deterministic: always the same shapes, whatever the number of active slots.

    Raises:
        UsageError: ``dtype`` is "int8".
    """

    name = "cuda-graphs"
    linear = CudaLinear

    def __init__(
        self, model: GPT, slots: int, context: int, device: torch.device, dtype: str,
        deterministic: bool,
    ) -> None:  # fmt: skip
        if dtype == "int8":
            raise UsageError(
                "dtype int8 is for CPUs: on CUDA every step would expand the weights, which is "
                "slower than bf16; use bf16"
            )
        super().__init__(model, slots, context, device, dtype, deterministic)
        self.graphed = device.type == "cuda"
        vocabulary, columns = model.vocab_size, len(model.head_weight)
        # Graphs may share memory, as no two run at once and what they return is in these tensors.
        self.pool = torch.cuda.graph_pool_handle() if self.graphed else None
        self.tables = self.sampler.all_tables()
        self.raw = torch.zeros(slots, columns, device=device)
        self.scores = torch.zeros(slots, decode.scratch_width(vocabulary), device=device)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.results = torch.zeros(slots, dtype=torch.int64, pin_memory=self.graphed)
        self._next = np.zeros((4, slots), np.int64)
        """What the device's inputs are."""
        self._lock = threading.Lock()
        """Held while a graph is recorded, and while work is launched."""
        self._ready = False

    @property
    def row_counts(self) -> list[int]:
        """The numbers of rows that steps can have, the highest first."""
        return sorted({self.rows(slot) for slot in range(self.slots)}, reverse=True)

    @torch.inference_mode()
    def load(self, model: GPT) -> TorchWeights:
        """Copy the weights of ``model``, and record a graph for each number of rows."""
        weights = super().load(model)
        if self.graphed:
            self._record(weights)
        return weights

    def _record(self, weights: TorchWeights) -> None:
        """Record the graphs. The first time each step runs before, which compiles its kernels.

        Later nothing runs: other sequences are being decoded then, and the graphs share their
        cache. The stream is the device's own: without one, recording is on the current device.
        """
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            for rows in self.row_counts:
                with self._lock:
                    if not self._ready:
                        stream.wait_stream(torch.cuda.current_stream(self.device))
                        with torch.cuda.stream(stream):
                            self._forward(weights, rows)
                    stream.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    # thread_local: another thread may use the device meanwhile.
                    with torch.cuda.graph(
                        graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
                    ):
                        self._forward(weights, rows)
                    weights.graphs[rows] = graph
            self._ready = True

    @contextmanager
    def _launching(self) -> Iterator[None]:
        with self._lock, sdpa_kernel(ATTENTION):
            yield

    @torch.inference_mode()
    def prefill(self, weights: TorchWeights, chunks: Sequence[Chunk]) -> None:
        with self._launching():
            super().prefill(weights, chunks)

    @torch.inference_mode()
    def logits(self, weights: TorchWeights, chunk: Chunk) -> Tensor:
        with self._launching():
            return super().logits(weights, chunk)

    def _keys(self, end: int) -> int:
        return min(-(-end // BUCKET) * BUCKET, self.context)

    @torch.inference_mode()
    def step(
        self, weights: TorchWeights, slots: np.ndarray, ids: np.ndarray, positions: np.ndarray,
        lengths: np.ndarray, generated: np.ndarray,
    ) -> list[np.ndarray]:  # fmt: skip
        with self._launching():
            rows = self.rows(int(slots.max()))
            self._upload(slots, ids, positions, generated)
            if self.graphed:
                weights.graphs[rows].replay()
            else:
                self._forward(weights, rows)
            plan = self.sampler.plan(slots.tolist())
            details: tuple[Tensor, ...] = ()
            if plan.logprobs is not None:
                shown = self.raw[:rows, : self.sampler.vocab_size]
                details = log_probabilities(shown, self.tokens[:rows], plan.logprobs)
            self.results.copy_(self.tokens, non_blocking=True)
            if self.graphed:
                torch.cuda.current_stream(self.device).synchronize()  # the only one of a step
        tokens = self.results.numpy()[slots]
        self._next[0, slots] = tokens
        self._next[1:3, slots] += 1
        return [tokens, *(part.cpu().numpy()[slots] for part in details)]

    def _upload(
        self, slots: np.ndarray, ids: np.ndarray, positions: np.ndarray, generated: np.ndarray
    ) -> None:
        """Tell the device what to compute, where that is not what follows from the last step."""
        wanted = self._next.copy()
        wanted[3] = 0
        wanted[:, slots] = ids, positions, generated[slots], np.ones_like(slots)
        if np.array_equal(wanted, self._next):
            return
        self._next = wanted
        self._send(wanted)

    def _send(self, inputs: np.ndarray) -> None:
        self.staging.copy_(torch.from_numpy(inputs))
        self.inputs.copy_(self.staging, non_blocking=True)

    def _forward(self, weights: TorchWeights, rows: int) -> None:
        """One step of slots 0 to ``rows`` - 1, from `inputs` to `tokens` and the next `inputs`."""
        ids, positions, _, active = (row[:rows] for row in self.inputs)
        head = weights.head
        assert isinstance(head, CudaLinear)
        logits = head.wide(self._blocks(weights, ids, positions, active))
        logits = ops.soft_cap(logits, self.parts.soft_cap)
        self.raw[:rows].copy_(logits)
        decode.sample(
            self.raw[:rows], self.sampler.vocab_size, self.sampler.scales, self.sampler.numbers,
            self.tables, self.sampler.flags, self.inputs, self.dropped, self.scores, self.tokens,
        )  # fmt: skip

    def _blocks(
        self, weights: TorchWeights, ids: Tensor, positions: Tensor, active: Tensor
    ) -> Tensor:
        """Final activations (rows, C) in the compute dtype."""
        stream = self._embed(weights, ids, positions)
        dtype = weights.head.compute
        if not weights.layers:
            return stream.to(dtype)
        pre = weights.layers[0].pre_norm
        norms = [norm for layer in weights.layers for norm in (layer.ln_1, layer.ln_2)]
        # A norm before a branch reads the sum of all branches so far; one after it is the stream.
        following = [*norms[1:], weights.final] if pre and weights.final else norms
        x = norms[0].add(stream, None, dtype) if pre else stream.to(dtype)
        for index, layer in enumerate(weights.layers):
            qkv = self._turned(layer.qkv(x), positions)
            mixed = decode.decode_attention(qkv, self.cache[index], positions, active, self.n_head)
            x = following[2 * index].add(stream, layer.mix(mixed), dtype, keep=not pre)
            branch = layer.down(layer.activation(layer.up(x)))
            x = following[2 * index + 1].add(stream, branch, dtype, keep=not pre)
        return x
