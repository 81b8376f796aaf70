"""Import DeepSpeed in the process for forks, for the CPU and without its banner."""

import logging
import os

os.environ["DS_ACCELERATOR"] = "cpu"
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
