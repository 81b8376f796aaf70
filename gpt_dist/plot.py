"""Draw the loss curves of one or several runs: ``python -m gpt_dist.plot RUN [RUN ...]``."""

from __future__ import annotations

from pathlib import Path

from gpt_dist.errors import Parser, run_main
from gpt_dist.training.reporting.curves import plot_runs


def main() -> None:
    parser = Parser(
        prog="gpt_dist.plot",
        description="Draw training and validation loss of one or several runs.",
        epilog="example: python -m gpt_dist.plot runs/a runs/b --out compare.pdf",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png|pdf|svg",
        help="picture to write (default: loss.png in the first RUN)",
    )
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0] / "loss.png"
    plot_runs(arguments.runs, out)
    print(out)


if __name__ == "__main__":
    run_main(main)
