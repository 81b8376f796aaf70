"""Build docs/performance.md and the pictures of docs/images from the records.

    python benchmarks/report.py            # writes the page and the pictures
    python benchmarks/report.py --check    # exits with 1 if the page would change

Each file of benchmarks/results must name its command, machine, date, commit and versions, and a
comparison the versions of the peers. If a file does not, the error names it and nothing is written.
"""

from __future__ import annotations

import json
from pathlib import Path

from flags import benchmark_parser
from pictures import draw_all, picture_of
from sections import SECTIONS, Record

from gpt_dist.errors import GptDistError, run_main

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/performance.md"
NEEDED = ("command", "machine", "date", "commit", "versions")

HEAD = """# Performance

<!-- Made by benchmarks/report.py from benchmarks/results: change those. -->

Below each figure is the command that measured it, with machine, date, commit and versions. In a
comparison all contestants take turns within one run; the tables show the median with the lowest and
the highest value. `benchmarks/LOG.md` lists what was tried and did not help.
"""


def kind_of(path: Path) -> str:
    """``learning-wikipedia.json`` → ``learning``."""
    return path.stem.split("-")[0]


def read(path: Path) -> Record:
    """A record, checked for what the page needs of it.

    Raises:
        GptDistError: a key or a version is missing.
    """
    kind = kind_of(path)
    if kind not in SECTIONS:
        raise GptDistError(
            f"{path}: unknown kind; valid beginnings of a name: {', '.join(SECTIONS)}"
        )
    found: Record = json.loads(path.read_text())
    for key in NEEDED:
        if not found.get(key):
            raise GptDistError(f"{path}: lacks {key!r}; measure it again")
    missing = {"torch", *SECTIONS[kind][2]} - set(found["versions"])
    if missing:
        raise GptDistError(f"{path}: lacks the version of {', '.join(sorted(missing))}")
    return found


def nested_commands(found: Record) -> list[str]:
    """Commands of the parts of a record that were measured separately."""
    parts = [value for value in found.values() if isinstance(value, dict)]
    return [part["command"] for part in parts if "command" in part]


def page(records: dict[Path, Record]) -> str:
    """The whole page."""
    parts = [HEAD]
    for kind, (heading, text, _) in SECTIONS.items():
        chosen = {path: found for path, found in records.items() if kind_of(path) == kind}
        if chosen:
            parts.append(f"## {heading}\n")
        for path, found in chosen.items():
            versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
            parts.append(text(found) + "\n")
            if picture_of(kind, found):
                parts.append(f"![{heading}](images/{path.stem}.png)\n")
            if "note" in found:
                parts.append(f"{found['note']}\n")
            commands = dict.fromkeys([*nested_commands(found), found["command"]])
            parts.append("  \n".join(f"`{command}`" for command in commands) + "  ")
            parts.append(
                f"{found['machine']}, {found['date']}, commit {found['commit']}, {versions}\n"
            )
    return "\n".join(parts)


def main() -> int:
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="the records")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help="the page")
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    arguments = parser.parse_args()
    records = {path: read(path) for path in sorted(arguments.results.rglob("*.json"))}
    made = page(records)
    if arguments.check:
        same = arguments.out.exists() and arguments.out.read_text() == made
        print("up to date" if same else f"{arguments.out} is not what the records say")
        return 0 if same else 1
    arguments.out.write_text(made)
    print(f"written: {arguments.out}")
    for picture in draw_all(records, arguments.results, arguments.out.parent / "images"):
        print(f"written: {picture}")
    return 0


if __name__ == "__main__":
    run_main(main)
