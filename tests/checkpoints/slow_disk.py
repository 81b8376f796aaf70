"""``gpt_dist.train`` whose disk takes so many seconds for each checkpoint: ``SECONDS FLAGS…``."""

from __future__ import annotations

import sys
import time
from typing import Any

import gpt_dist.checkpoints.writer
from gpt_dist.errors import run_main
from gpt_dist.train import main

seconds = float(sys.argv.pop(1))
write = gpt_dist.checkpoints.writer.write_file


def slowly(*args: Any) -> str:
    if args[0].name == "state.json":
        time.sleep(seconds)
    return write(*args)


gpt_dist.checkpoints.writer.write_file = slowly
run_main(main)
