"""Several training runs in one process (one set of ranks): ``train_many.py RUNS.json``.

The file holds argument lists of ``gpt_dist.train``; a run may start from a copy of another run's
directory (``["--copy", SOURCE, TARGET, PATTERN]``), without the files that match the pattern. This
saves the seconds of every start-up.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

from gpt_dist.config.command_line import load
from gpt_dist.errors import run_main
from gpt_dist.parallel import world as distributed
from gpt_dist.training import trainer
from gpt_dist.training.signals import StopSignal


def main() -> None:
    # Drawing takes a third of so short a run.
    trainer.draw = lambda out_dir: None  # type: ignore[assignment]
    with StopSignal() as stop, distributed.start("cpu") as world:
        for arguments in json.loads(Path(sys.argv[1]).read_text()):
            if arguments[0] == "--copy":
                source, target, pattern = arguments[1:]
                ignored = shutil.ignore_patterns(pattern)
                world.decide(partial(shutil.copytree, source, target, True, ignored))
            else:
                trainer.train_here(load(arguments)[0], world, stop)


if __name__ == "__main__":
    run_main(main)
