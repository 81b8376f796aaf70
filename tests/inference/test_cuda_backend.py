"""The backend for CUDA: the same tokens as PyTorch's, few launches, and no graph for a request."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpt_dist.config.settings import ModelConfig
from gpt_dist.errors import UsageError
from gpt_dist.inference import decoder as decoding
from gpt_dist.inference.cuda_backend import CudaBackend
from gpt_dist.inference.decoder import Decoder
from gpt_dist.inference.sampling import SamplingParams
from gpt_dist.inference.torch_backend import TorchBackend
from gpt_dist.model.empty import empty_model
from gpt_dist.model.gpt import GPT
from tests.gpu.fake import Watch, fake_cuda

TINY = {"n_layer": 3, "n_head": 4, "n_embd": 64, "context_length": 32, "vocab_size": 203}


def make(**shape: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig.model_validate(TINY | shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


SAMPLING = [
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(seed=1, top_k=9),
    SamplingParams(seed=2, repetition_penalty=1.3, frequency_penalty=0.2),
    SamplingParams(seed=3, top_p=0.8, logit_bias={4: 3.0}),
    SamplingParams(temperature=0.0, min_new_tokens=9, stop_ids=(1, 2, 3)),
]


def continuations(kind: type[TorchBackend], model: GPT, patch: pytest.MonkeyPatch) -> list[Any]:
    """What five sequences that come and go at different steps are continued with."""
    patch.setattr(decoding, "make_backend", kind)
    decoder = Decoder(model, max_slots=4, device="cpu", dtype="fp32")
    found: list[Any] = [[] for _ in SAMPLING]
    owner: dict[int, int] = {}
    waiting = list(range(len(SAMPLING)))
    for step in range(26):
        if waiting and len(owner) < 4 and step % 2 == 0:
            number, slot = waiting.pop(0), decoder.free_slots[0]
            prompt = [(7 * number + n) % 203 for n in range(2 + 3 * number)]
            decoder.prefill(slot, prompt[:-1])
            decoder.activate(slot, SAMPLING[number], prompt)
            owner[slot] = number
        result = decoder.step()
        rows = zip(result.slots, result.tokens, result.logprobs, result.top, strict=True)
        for slot, token, logprob, top in rows:
            found[owner[slot]].append((token, logprob, [which for which, _ in top]))
            if len(found[owner[slot]]) == 10:
                decoder.free(slot)
                del owner[slot]
    return found


@pytest.mark.parametrize(
    "shape",
    [{}, {"norm": "post"}, {"n_layer": 0}, {"bias": False, "tie_embeddings": False},
     {"architecture": "nanochat", "tie_embeddings": False, "bias": False}],
    ids=["gpt2", "post", "bigram", "no bias", "nanochat"],
)  # fmt: skip
def test_the_same_tokens(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(**shape)
    plain = continuations(TorchBackend, model, monkeypatch)
    own = continuations(CudaBackend, model, monkeypatch)
    assert [len(tokens) for tokens in plain] == [10] * 5
    for mine, theirs in zip(own, plain, strict=True):
        assert [row[0] for row in mine] == [row[0] for row in theirs]
        assert [row[2] for row in mine] == [row[2] for row in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert a[1] == pytest.approx(b[1], abs=1e-5)


def test_a_step_that_follows_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that was chosen is the next step's input on the device."""
    monkeypatch.setattr(decoding, "make_backend", CudaBackend)
    decoder = Decoder(make(), max_slots=2, device="cpu", dtype="fp32")
    uploads: list[int] = []
    send = CudaBackend._send

    def count(backend: CudaBackend, inputs: np.ndarray) -> None:
        uploads.append(1)
        send(backend, inputs)

    monkeypatch.setattr(CudaBackend, "_send", count)
    for slot in (0, 1):
        decoder.activate(slot, SamplingParams(seed=slot), [slot + 1])
    for _ in range(5):
        decoder.step()
    assert len(uploads) == 1
    decoder.free(0)
    decoder.step()
    decoder.step()
    assert len(uploads) == 2


def unpinned(make: Callable[..., Any], *args: Any, pin_memory: bool = False, **rest: Any) -> Any:
    """``torch.zeros`` without pinned memory, which needs a GPU."""
    return make(*args, **rest)


class Cuda:
    """Stands in for ``torch.cuda``: notes what is recorded, where, and what runs besides."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.recorded: list[int] = []
        self.run: list[int] = []
        self.modes: set[str] = set()
        self.devices: list[Any] = []
        self.recording = False
        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)

        @contextmanager
        def device(which: Any) -> Iterator[None]:
            self.devices.append(which)
            yield

        @contextmanager
        def graph(graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            self.modes.add(capture_error_mode)
            assert stream is not None
            self.recording = True
            yield
            self.recording = False

        @contextmanager
        def using(stream: Any) -> Iterator[None]:
            yield

        for name, value in {
            "device": device,
            "graph": graph,
            "stream": using,
            "Stream": lambda device: self.devices.append(device) or stream,
            "current_stream": lambda device: stream,
            "graph_pool_handle": lambda: None,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        }.items():
            patch.setattr(torch.cuda, name, value)

        def forward(backend: CudaBackend, weights: Any, rows: int) -> None:
            (self.recorded if self.recording else self.run).append(rows)

        patch.setattr(CudaBackend, "_forward", forward)
        always = property(lambda self: True, lambda self, on: None)
        patch.setattr(CudaBackend, "graphed", always, raising=False)
        patch.setattr(torch, "zeros", functools.partial(unpinned, torch.zeros))


def test_every_graph_is_recorded_before_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each number of rows, on the decoder's device; no request records another."""
    cuda = Cuda(monkeypatch)
    monkeypatch.setattr(decoding, "make_backend", CudaBackend)
    decoder = Decoder(make(), max_slots=6, device="cpu", dtype="fp32")
    assert cuda.recorded == cuda.run == [6, 4, 2, 1]
    assert cuda.modes == {"thread_local"}
    assert set(cuda.devices) == {decoder.device}
    first = decoder.weights
    for slot, params in enumerate(SAMPLING):
        decoder.prefill(slot, [1, 2, 3])
        decoder.activate(slot, params, [1, 2, 3])
        decoder.step()
    assert cuda.recorded == cuda.run == [6, 4, 2, 1]
    second = decoder.load_weights(make())
    assert cuda.recorded == [6, 4, 2, 1] * 2
    assert cuda.run == [6, 4, 2, 1]  # while sequences go on, nothing may write to their cache
    assert set(first.data.graphs) == set(second.data.graphs) == {1, 2, 4, 6}


def test_nothing_is_launched_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    monkeypatch.setattr(decoding, "make_backend", CudaBackend)
    decoder = Decoder(make(), max_slots=2, device="cpu", dtype="fp32")
    backend: Any = decoder._backend
    seen: list[bool] = []

    def note(*_: Any) -> None:
        seen.append(backend._lock.locked())

    monkeypatch.setattr(CudaBackend, "_forward", note)
    monkeypatch.setattr(TorchBackend, "prefill", note)
    decoder.load_weights(make())
    decoder.prefill(0, [1, 2])
    decoder.flush()
    monkeypatch.setattr(CudaBackend, "_upload", note)
    decoder.activate(1, SamplingParams(), [3])
    decoder.step()
    assert seen == [True] * len(seen)
    assert len(seen) == 4


def test_int8_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^dtype int8 is for CPUs: [^\n]*; use bf16$"):
        CudaBackend(make(), 1, 8, torch.device("cpu"), "int8", False)


@pytest.mark.parametrize("rows", [1, 64])
def test_launches_of_a_step(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 124M under a fake CUDA device: one device, nothing read back, at most 130 kernels."""
    from gpt_dist.ops.triton.decode import splits

    config = ModelConfig(
        n_layer=12, n_head=12, n_embd=768, context_length=1024, vocab_size=50257
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(CudaBackend, "_record", lambda *_: None)
    monkeypatch.setattr(torch, "zeros", functools.partial(unpinned, torch.zeros))
    with fake_cuda() as device:
        model = empty_model(config)
        backend = CudaBackend(model, 64, 1024, device, "bf16", False)
        weights = backend.load(model)
        with Watch() as watch, torch.inference_mode():
            backend._forward(weights, rows)
    launches = sum(watch.launches.values())
    launches += 12 * (splits(rows, 12) > 1)  # parts of keys are combined by a second kernel
    assert launches == (116 if rows == 1 else 104), watch.launches
    assert not {"item", "_local_scalar_dense", "nonzero"} & set(watch.launches)
