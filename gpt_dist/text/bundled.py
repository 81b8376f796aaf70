"""The text that comes with the package: nine plays of Shakespeare."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

SHAKESPEARE = Path(str(resources.files("gpt_dist.text") / "assets" / "shakespeare.txt.gz"))
"""The plays as a gzip file; ``assets/README.md`` says where they are from."""


def shakespeare() -> str:
    """The plays, 1 MB of plain ASCII."""
    return gzip.decompress(SHAKESPEARE.read_bytes()).decode()
