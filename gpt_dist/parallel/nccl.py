"""What NCCL does when a rank does not answer, set on purpose.

PyTorch's watchdog, a thread in C++, finds a collective that takes longer than its timeout. It ends
the process by a signal, because the main thread waits for the GPU and would wait for ever. No
Python runs then, so that ``RollCall`` cannot speak: the log has the watchdog's line instead.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

RECORDER = "GPT_DIST_FLIGHT_RECORDER"
"""Names a directory in which each rank writes its last collectives when one times out."""

ENTRIES = "2000"
"""Collectives that the flight recorder remembers: several steps of DDP."""

SETTINGS = {
    # End the process when a collective fails or times out, without waiting for other ranks.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # End it too if the watchdog itself hangs, in a driver's call for example.
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "480",
}


def set_nccl(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set yet. Call this before the process group is made."""
    wanted = dict(SETTINGS)
    if directory := environment.get(RECORDER):
        Path(directory).mkdir(parents=True, exist_ok=True)
        file = str(Path(directory) / "rank_")
        # Two of the names have changed; PyTorch reads both.
        wanted |= {
            "TORCH_FR_BUFFER_SIZE": ENTRIES,
            "TORCH_NCCL_TRACE_BUFFER_SIZE": ENTRIES,
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_FR_DUMP_TEMP_FILE": file,
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": file,
        }
    for name, value in wanted.items():
        environment.setdefault(name, value)
