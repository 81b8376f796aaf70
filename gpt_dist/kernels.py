"""Build the CPU kernels now: ``python -m gpt_dist.kernels``."""

from __future__ import annotations

import subprocess

from gpt_dist.errors import GptDistError, Parser, run_main


def main() -> None:
    """Build the kernels now.

    Raises:
        GptDistError: they cannot be had here; says why.
    """
    Parser(prog="gpt_dist.kernels", description="Build the CPU kernels now.").parse_args()
    from gpt_dist.ops.build import KERNELS, build, unavailable  # imports torch

    reason = unavailable()
    if reason:
        raise GptDistError(f"no CPU kernels here: {reason}; everything runs in plain PyTorch")
    try:
        for source in KERNELS:
            print(f"CPU kernels: {build(source)}")
    except subprocess.CalledProcessError as error:
        raise GptDistError(f"building the CPU kernels failed:\n{error.stderr}") from None


if __name__ == "__main__":
    run_main(main)
