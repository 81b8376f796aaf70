"""Registration of the operations, so that PyTorch's dispatcher chooses their implementation.

Every operation is ``torch.ops.gpt_dist.<name>``. Its reference in PyTorch runs on any device, is
differentiable, and is what ``torch.compile`` traces; a device with a faster implementation
registers it for that device alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

_library = library.Library("gpt_dist", "DEF")

names: list[str] = []
"""Every registered operation."""


def register(schema: str, reference: Callable[..., Any], **devices: Callable[..., Any]) -> Any:
    """Define a differentiable operation.

    Args:
        schema: name, arguments and results, as in PyTorch's ``native_functions.yaml``.
        reference: its meaning, in differentiable PyTorch operations.
        devices: ``cpu=``, ``cuda=``: implementations for one device, differentiable too. They fall
            back to the reference for inputs that they do not support, and for tensors that are
            not `concrete`.

    Returns:
        The operation, to be called like the reference.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    names.append(name)
    _library.impl(name, reference, "CompositeImplicitAutograd")
    for device, implementation in devices.items():
        for key in (device.upper(), f"Autograd{device.upper()}"):
            _library.impl(name, implementation, key)
    return getattr(torch.ops.gpt_dist, name).default


def register_in_place(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    **devices: Callable[..., Any],
) -> Any:
    """Define an operation that overwrites an argument and is not differentiable.

    Args:
        schema: as for `register`.
        reference: its meaning, in PyTorch, on any device.
        fake: results of the right shape and dtype, without computing them.
        devices: as for `register`.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    names.append(name)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    for device, implementation in devices.items():
        _library.impl(name, implementation, device.upper())
    library.register_fake(f"gpt_dist::{name}", fake, lib=_library)
    return getattr(torch.ops.gpt_dist, name).default


def concrete(x: Tensor) -> bool:
    """Whether a tensor has memory that a kernel can read; false while tracing or compiling."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
