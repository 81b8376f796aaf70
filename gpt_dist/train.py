"""Train GPT-2: ``torchrun --nproc_per_node=8 -m gpt_dist.train [--section.key value ...]``."""

from __future__ import annotations

import sys

from gpt_dist.config import help
from gpt_dist.errors import is_rank_0, run_main
from gpt_dist.parallel.watchdog import die_with_agent, stop_agent


def main() -> None:
    if set(help.FLAGS) & set(sys.argv[1:]):
        print(help.PAGE.read_text(encoding="utf-8"), end="")
        return
    from gpt_dist.config.command_line import parse

    command = parse(sys.argv[1:])
    if command.dry_run:
        from gpt_dist.training.dry_run import report

        if is_rank_0():
            print(report(command))
        return
    from gpt_dist.training.trainer import train  # imports torch, which a mistake does without

    train(command.config)


if __name__ == "__main__":
    die_with_agent()
    run_main(main, on_usage_error=stop_agent)
