"""Compile Triton kernels for GPUs that are not here, and read what the assembler reports."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITIES = (80, 90, 100)
"""A100, H100 and H200, B200."""


class Resources(NamedTuple):
    """What a thread of a compiled kernel takes."""

    registers: int
    stack: int
    local: int
    """Bytes of local memory, as ``stack``: what registers spill to."""


def resources(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
    capability: int,
) -> Resources:
    """Compile a kernel to machine code and ask NVIDIA's ``cuobjdump`` what it uses.

    Args:
        kernel: a function with ``@triton.jit``.
        signature: name → type of the arguments, in their order; pointers are aligned to 16 bytes.
        constants: name → value of those that are ``tl.constexpr``.
        options: of the compiler, such as ``num_warps``.
        capability: of the GPU, such as 90.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(
        kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", text)
    assert found, text
    return Resources(*map(int, found.groups()))
