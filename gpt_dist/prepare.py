"""Turn text into token shards: ``python -m gpt_dist.prepare SOURCE``.

    python -m gpt_dist.prepare shakespeare --tokenizer char
    python -m gpt_dist.prepare fineweb-edu --variant sample-10BT
    python -m gpt_dist.prepare inspect data/shakespeare-char

Documents stream from the source through the tokenizer into shards; memory stays bounded. After a
kill the same command resumes. The shards depend neither on that nor on the number of workers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt_dist.data.preparation.options import parse
from gpt_dist.errors import run_main


def main() -> int:
    args = parse(sys.argv[1:])
    if args.command == "inspect":
        from gpt_dist.data.preparation.inspect import inspect

        return inspect(Path(args.directory))
    from gpt_dist.data.preparation.run import prepare

    prepare(args)
    return 0


if __name__ == "__main__":
    run_main(main)
