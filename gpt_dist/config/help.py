"""``gpt_dist.train --help``, which prints a page that is kept in a file.

Building the page from the settings takes 0.3 s, reading it nothing. After a change of the settings
write it again with ``python -m gpt_dist.config.help``; a test compares.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FLAGS = ("-h", "--help")
PAGE = Path(__file__).with_name("help.txt")
COLUMNS = 80


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=COLUMNS - 2)


def make_parser() -> argparse.ArgumentParser:
    """A parser of every flag, for its help alone: ``parse`` reads a command line."""
    from gpt_dist.config.command_line import choices, presets
    from gpt_dist.config.planning import HELP
    from gpt_dist.config.settings import flags

    parser = argparse.ArgumentParser(
        prog="gpt_dist.train",
        formatter_class=_Formatter,
        usage="[torchrun --nproc_per_node=N -m | python -m] gpt_dist.train "
        "[--config NAME|FILE] [--dry-run [--ranks N] [--mfu SHARE] [--device-memory SIZE]] "
        "[--section.key value ...]",
        description="Train GPT-2. Without flags: the gpt2-124m preset.\n\n"
        "  python -m gpt_dist.train --config shakespeare-char-cpu\n"
        "  torchrun --nproc_per_node=8 -m gpt_dist.train --train.micro_batch_size 32\n\n"
        f"presets: {', '.join(presets())}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        default="gpt2-124m",
        help="preset or YAML file (default: gpt2-124m)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would need (memory, time, disk) and what is wrong, and exit",
    )
    planning = parser.add_argument_group("with --dry-run")
    for flag, (metavar, text) in HELP.items():
        planning.add_argument(f"--{flag}", metavar=metavar, help=text)
    groups: dict[str, Any] = {}
    for flag, field in flags().items():
        section = flag.split(".")[0] if "." in flag else "run"
        group = groups.setdefault(section, parser.add_argument_group(section))
        default = "null" if field.default is None else field.default
        group.add_argument(
            f"--{flag}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{field.description} [{choices(field.annotation)}; default {default}]".replace(
                "%", "%%"
            ),
        )
    return parser


if __name__ == "__main__":
    PAGE.write_text(make_parser().format_help(), encoding="utf-8")
