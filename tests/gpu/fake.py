"""A CUDA device that computes nothing: shapes, devices and dtypes are checked, memory is counted.

`FakeTensorMode` refuses tensors of two devices in one operation, and reading a value back.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select",
    "unsqueeze", "squeeze", "split", "unbind", "detach", "alias", "as_strided", "chunk",
    "split_with_sizes", "lift_fresh", "device",
}  # fmt: skip
"""Operations that launch nothing."""


OPERATORS = {"__invert__": "bitwise_not", "__or__": "bitwise_or", "__and__": "bitwise_and"}
"""Python's names of operators and PyTorch's."""


class _Indexing(TorchFunctionMode):
    """Indexing by operators; Python's own asks a build without CUDA for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _chosen(*args)
        if func is Tensor.__setitem__:
            part, value = _chosen(*args[:2]), args[2]
            return _copy(part, value) if isinstance(value, Tensor) else part.fill_(value)
        if func is Tensor.copy_:
            return _copy(*args)
        if func is Tensor.to and (found := _moved(*args, **kwargs or {})) is not None:
            return found
        try:
            return func(*args, **kwargs or {})
        except RuntimeError as error:
            if "not linked with support" not in str(error):
                raise
            name = OPERATORS.get(func.__name__, func.__name__)
            return getattr(torch.ops.aten, name)(*args, **kwargs or {})


def _moved(x: Tensor, *args: Any, **options: Any) -> Tensor | None:
    """``x.to(device, ...)``; None where the device stays and something else changes."""
    targets = [a for a in args if isinstance(a, torch.device | str)] + [options.get("device")]
    target = torch.device(targets[0]) if targets[0] is not None else x.device
    dtypes = [a for a in args if isinstance(a, torch.dtype)] + [options.get("dtype") or x.dtype]
    if target.type == x.device.type:
        return x if targets[0] is not None and dtypes[0] == x.dtype else None
    return torch.empty(x.shape, dtype=dtypes[0], device=target)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return torch.ops.aten.copy_(target, source, non_blocking)


def _chosen(x: Tensor, index: Any) -> Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        at = next(n for n, part in enumerate(parts) if part is Ellipsis)
        whole = x.dim() - sum(part is not None for part in parts) + 1
        parts[at : at + 1] = [slice(None)] * whole
    chosen: list[Tensor | None] = []
    for part in parts:
        dim = len(chosen)
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        chosen.append(part if isinstance(part, Tensor) else None)
    if any(part is not None for part in chosen):
        x = torch.ops.aten.index(x, chosen)
    return x


class Watch(TorchDispatchMode):
    """Counts the operations that launch a kernel, and the bytes of the tensors that live.

    Attributes:
        launches: operation → how often.
        peak: most bytes of tensors that were made meanwhile and lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes = self.peak = 0
        self._storages: dict[int, int] = {}

    def _free(self, key: int) -> None:
        self.bytes -= self._storages.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        if name in VIEWS or (name == "to" and result is args[0]):
            return result
        if not name.startswith(("empty", "new_empty")):
            self.launches[name] += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._storages:
                    self._storages[key] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.bytes)
        return result


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """A context in which tensors on the yielded device have no memory."""
    with FakeTensorMode(), _Indexing():
        yield torch.device("cuda")
