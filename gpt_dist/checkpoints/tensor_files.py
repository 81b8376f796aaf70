"""safetensors files: written through to the disk with a checksum, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt_dist.errors import GptDistError
from gpt_dist.files import naming

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write a file through to the disk; returns its sha256 in hexadecimal.

    Raises:
        OSError: with the file's name, which Python's own error for a full disk lacks.
    """
    digest = hashlib.sha256()
    with naming(path), path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def safetensors_chunks(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor (github.com/huggingface/safetensors).

    The library's own writer copies every tensor and does not compute a checksum as it writes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """A safetensors file that is read one tensor at a time.

    Raises:
        GptDistError: the file is truncated or of another format, or lacks a tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise GptDistError(f"{path}: not a complete safetensors file ({error})") from None
        self.names: set[str] = set(self._file.keys())

    def __call__(self, name: str) -> Tensor:
        if name not in self.names:
            raise GptDistError(f"{self.path}: lacks the tensor {name}")
        tensor: Tensor = self._file.get_tensor(name)
        return tensor
