"""One name for each data set: what prepare writes is what presets, scripts and pages read."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from gpt_dist.config.command_line import load, presets
from gpt_dist.config.settings import Config
from gpt_dist.data.catalog import default_directory, prepare_command
from gpt_dist.data.preparation.options import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sbatch")), *sorted((ROOT / "launch").rglob("*.sh"))]


def commands(text: str, module: str) -> list[list[str]]:
    """Arguments of each ``-m MODULE`` in a text, except where a variable or "…" stands in them."""
    found = re.findall(rf"-m {re.escape(module)}((?: [^\n`;]*)?)", text)
    split = [shlex.split(arguments, comments=True) for arguments in found]
    return [words for words in split if not re.search(r"[$…]", "".join(words))]


def written(arguments: list[str]) -> str | None:
    """The directory that a prepare command writes."""
    if "--help" in arguments or arguments[0] == "inspect":
        return None
    args = parse(arguments)
    return args.out or str(default_directory(args.command, args.variant, args.tokenizer))


def prepared(text: str) -> set[str]:
    found = map(written, commands(text, "gpt_dist.prepare"))
    return {directory for directory in found if directory}


def read_by(arguments: list[str]) -> list[str]:
    """The data sets that a train command reads."""
    if "--help" in arguments:
        return []
    keep = [arguments[i : i + 2] for i, word in enumerate(arguments) if word == "--data.path"]
    preset = [arguments[i : i + 2] for i, word in enumerate(arguments) if word == "--config"]
    config, _ = load([word for pair in (*preset, *keep) for word in pair])
    return list(config.data.path)


@pytest.mark.parametrize("name", presets())
def test_a_preset_reads_what_its_own_first_lines_prepare(name: str) -> None:
    config, _ = load(["--config", name])
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.replace("\n#   ", "\n")
    assert prepared(lines) == set(config.data.path)
    (train,) = commands(lines, "gpt_dist.train")
    assert read_by(train) == list(config.data.path)


def test_the_default_of_the_code_is_the_recipe() -> None:
    directory = default_directory("fineweb-edu", None, "gpt2")
    assert list(Config().data.path) == [str(directory)]
    assert list(load([])[0].data.path) == [str(directory)]
    assert prepare_command(directory) == (
        "python -m gpt_dist.prepare fineweb-edu --variant sample-10BT"
    )


def test_the_slurm_job_prepares_what_the_recipe_reads(tmp_path: Path) -> None:
    """The script itself, with an ``srun`` that prints its arguments."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    script = ROOT / "launch" / "slurm" / "prepare.sbatch"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    arguments = words[words.index("gpt_dist.prepare") + 1 :]
    assert written(arguments) == next(iter(Config().data.path))
    for line in script.read_text().splitlines():  # and the examples in its comments
        if match := re.match(r"# +sbatch launch/slurm/prepare.sbatch +([^# ][^#]*)", line):
            arguments = shlex.split(match[1])
            args = parse(arguments)
            default = default_directory(args.command, args.variant, args.tokenizer)
            assert written(arguments) == str(default)


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: path.name)
def test_pages_and_scripts_read_what_is_prepared(path: Path) -> None:
    """Each data set that a command reads is one that a command on the page or a preset makes."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    known = prepared(text)
    for name in presets():
        known |= prepared((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    for arguments in commands(text, "gpt_dist.train"):
        for directory in read_by(arguments):
            by_its_name = "SOURCE" not in prepare_command(Path(directory))
            assert directory in known or by_its_name, f"{directory}: nothing here prepares it"
    for arguments in commands(text, "gpt_dist.prepare"):
        if arguments[:1] == ["inspect"]:
            assert arguments[1] in known
