"""Train GPT-2: ``torchrun --nproc_per_node=8 -m gpt_dist.train [--section.key value ...]``."""

from __future__ import annotations

import sys

from gpt_dist.config.command_line import parse
from gpt_dist.errors import is_rank_0, run_main
from gpt_dist.parallel.watchdog import die_with_agent, stop_agent


def main() -> None:
    command = parse(sys.argv[1:])
    if command.dry_run:
        from gpt_dist.training.dry_run import report

        if is_rank_0():
            print(report(command))
        return
    from gpt_dist.training.trainer import train  # imports torch, which --help does without

    train(command.config)


if __name__ == "__main__":
    die_with_agent()
    run_main(main, on_usage_error=stop_agent)
