"""From presets, YAML files and the command line to one validated configuration.

    config, dry_run = load(["--config", "shakespeare-char", "--train.steps", "500"])

reads the preset (or YAML file), lays the dotted overrides over it and validates the whole. All
problems are reported together, each with the key, the value and what would be valid.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from gpt_dist.config.settings import Config, combination_problems
from gpt_dist.errors import UsageError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that ``6e-4`` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Plain YAML data (no objects are ever constructed)."""
    return yaml.load(text, Loader=_Loader)


def preset_directory() -> Path:
    """``configs/`` of the checkout, or its copy inside the installed package."""
    return Path(__file__).resolve().with_name("presets")


def presets() -> list[str]:
    """Names that ``--config`` knows without a path."""
    return sorted(path.stem for path in preset_directory().glob("*.yaml"))


def read_config_file(name: str) -> dict[str, Any]:
    """Settings of a preset or a YAML file, as nested dictionaries.

    Raises:
        UsageError: no such preset or file, or the file is not a mapping in YAML.
    """
    path = Path(name)
    if not path.is_file():
        path = preset_directory() / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(
            f"--config {name}: no such file or preset; presets: {', '.join(presets())}"
        )
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data or {}, dict):
        raise UsageError(f"--config {path}: expected a mapping of settings, got {data!r:.60}")
    return data or {}


def flags(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted flag → pydantic field, for every leaf setting."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= flags(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def choices(annotation: Any) -> str:
    """What a field accepts, in words: ``pre | post``, ``a whole number``, …"""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return choices(args[0])
    if origin is dict:
        return "DIR or DIR:WEIGHT,DIR:WEIGHT"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(choices(arg) for arg in args)
    names = {bool: "true | false", int: "a whole number", float: "a number", str: "text"}
    return names.get(annotation, "null" if annotation is type(None) else "a value")


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``gpt_dist.train``: only for ``--help`` and shell completion."""
    parser = argparse.ArgumentParser(
        prog="gpt_dist.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="[torchrun --nproc_per_node=N -m | python -m] gpt_dist.train "
        "[--config NAME|FILE] [--dry-run] [--section.key value ...]",
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
        help="print parameters, memory, steps and tokens, and exit",
    )
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


def load(argv: list[str]) -> tuple[Config, bool]:
    """Parse a command line into a validated configuration.

    Returns:
        The configuration and whether ``--dry-run`` was given.

    Raises:
        UsageError: with every problem found, a line each.
        SystemExit: after printing ``--help``.
    """
    if "-h" in argv or "--help" in argv:
        make_parser().parse_args(["--help"])
    known = flags()
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    special: dict[str, str] = {"config": "gpt2-124m"}
    dry_run = False
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--dry-run":
            dry_run = True
            continue
        if not argument.startswith("--"):
            problems.append(f"{argument}: expected --section.key value")
            continue
        if not equals:
            if not rest or (rest[0].startswith("--") and rest[0][2:3].isalpha()):
                problems.append(f"--{name}: needs a value")
                continue
            value = rest.pop(0)
        if name in special:
            special[name] = value
        elif name in known:
            overrides[name] = value
        else:
            problems.append(unknown_key(f"--{name}", name, [*known, "config", "dry-run"]))
    try:
        data = read_config_file(special["config"])
    except UsageError as error:
        raise UsageError("\n".join([str(error), *problems])) from None
    for name, value in overrides.items():
        *sections, key = name.split(".")
        target = data
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[key] = parse_scalar(value)
    return build(data, problems), dry_run


def parse_scalar(text: str) -> Any:
    """A command-line value as YAML would read it; what YAML cannot read is text."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def build(data: dict[str, Any], problems: list[str] | None = None) -> Config:
    """Validate nested dictionaries; raise one UsageError that lists every problem."""
    problems = list(problems or [])
    config = None
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += explain(error)
    if config is not None:
        problems += combination_problems(config, int(os.environ.get("WORLD_SIZE", "1")))
    if problems or config is None:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    return config


def explain(error: ValidationError) -> list[str]:
    """Pydantic's findings, one line a key: key, value, what would be valid."""
    known, lines = flags(), {}
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        # Union members and mapping keys add parts to the location: cut back to the setting.
        key = next(
            (".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known),
            ".".join(path),
        )
        if item["type"] == "extra_forbidden":
            lines[key] = unknown_key(key, key, list(known))
        elif key in known:
            detail = item["msg"][0].lower() + item["msg"][1:]
            valid = choices(known[key].annotation)
            again = lines.get(key)
            lines[key] = f"{key} = {_show(item['input'])}: {detail} (valid: {valid})"
            if again:  # several union members failed: the choices say it all
                lines[key] = f"{key} = {_show(item['input'])}: valid is {valid}"
        else:
            lines[key] = f"{key} = {_show(item['input'])}: expected a mapping of settings"
    return list(lines.values())


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def unknown_key(shown: str, key: str, known: list[str]) -> str:
    """``--trian.steps: no such setting; did you mean train.steps?``"""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        last = key.rpartition(".")[2]
        close = [name for name in known if name.rpartition(".")[2] == last][:1]
    hint = f"; did you mean {close[0]}?" if close else "; --help lists them"
    return f"{shown}: no such setting{hint}"
