"""From presets, YAML files and the command line to one validated configuration.

    command = parse(["--config", "shakespeare-char", "--train.steps", "500"])

reads the preset or YAML file, applies the dotted overrides and validates the result. All problems
are reported together, each with the key, the value and what would be valid.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ValidationError

from gpt_dist.config.conflicts import combination_problems
from gpt_dist.config.migrations import former_names, get, has, migrate, put, remove
from gpt_dist.config.planning import PARSERS, PlanOptions, plan_options
from gpt_dist.config.settings import (
    DEFAULT_TOKENIZER,
    Config,
    ModelConfig,
    flags,
)
from gpt_dist.config.unheard import COMMAND_LINE, FILE, unheard
from gpt_dist.errors import UsageError, is_rank_0


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that ``6e-4`` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Plain YAML data; no Python objects are constructed."""
    return yaml.load(text, Loader=_Loader)


def parse_settings(text: str) -> Any:
    """YAML in which a setting that is text is read as written: ``out_dir: 1.10`` is not 1.1.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _keep_text(node)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _keep_text(node: yaml.Node | None, prefix: str = "") -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        kind = flags()[name].annotation if name in flags() else None
        if is_text(kind):
            texts = [value]
        elif typing.get_origin(kind) is dict and isinstance(value, yaml.MappingNode):
            texts = [directory for directory, _ in value.value]
        elif typing.get_origin(kind) is dict:
            texts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        else:
            _keep_text(value, f"{name}.")
            continue
        for text in texts:
            if isinstance(text, yaml.ScalarNode) and text.tag != "tag:yaml.org,2002:null":
                text.tag = "tag:yaml.org,2002:str"


def is_text(annotation: Any) -> bool:
    """Whether a setting is text (or null)."""
    return annotation is str or set(typing.get_args(annotation)) == {str, type(None)}


def preset_directory() -> Path:
    """``configs/`` of the checkout, or its copy inside the installed package."""
    return Path(__file__).resolve().with_name("presets")


def presets() -> list[str]:
    """Names that ``--config`` accepts without a path."""
    return sorted(path.stem for path in preset_directory().glob("*.yaml"))


def is_file(name: str) -> bool:
    """Whether ``--config`` names a file, which comes before a preset of that name."""
    return Path(name).is_file()


def read_config_file(name: str) -> dict[str, Any]:
    """Settings of a preset or a YAML file, as nested dictionaries under today's names.

    Says on standard error which of them have an old name in the file.

    Raises:
        UsageError: no such preset or file, or the file is not a mapping in YAML.
    """
    path = Path(name) if is_file(name) else preset_directory() / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, presets(), n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; presets: {', '.join(presets())}"
        raise UsageError(f"--config {name}: no such file or preset{hint}")
    try:
        data = parse_settings(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        reason = f"{error.context or ''} {error.problem or ''}".strip()
        raise UsageError(f"--config {path}{line}: not YAML: {reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data or {}, dict):
        raise UsageError(f"--config {path}: expected a mapping of settings, got {data!r:.60}")
    return migrated(data or {}, f"--config {path}")


def migrated(data: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings under today's names; rank 0 says which of them ``source`` gave under an old one.

    Raises:
        UsageError: a setting is there under both.
    """
    try:
        data, changes = migrate(data)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    if is_rank_0():
        for change in changes:
            print(f"note: {source}: {change}", file=sys.stderr)
    return data


def choices(annotation: Any) -> str:
    """What a field accepts, in words: ``pre | post``, ``a whole number``, …"""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return choices(args[0])
    if origin is dict:
        return "DIR or DIR:WEIGHT,DIR:WEIGHT"
    if origin is tuple:
        return ",".join(choices(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(choices(arg) for arg in args)
    names = {bool: "true | false", int: "a whole number", float: "a number", str: "text"}
    return names.get(annotation, "null" if annotation is type(None) else "a value")


@dataclass(frozen=True)
class Command:
    """What a command line of ``gpt_dist.train`` says."""

    config: Config
    given: dict[str, str]
    """Setting → ``file`` or ``command line``, for the settings that the user gave."""
    dry_run: bool
    plan: PlanOptions


def load(argv: list[str]) -> tuple[Config, bool]:
    """The configuration of a command line, and whether ``--dry-run`` was given; see ``parse``."""
    command = parse(argv)
    return command.config, command.dry_run


def parse(argv: list[str]) -> Command:
    """Parse a command line into a validated configuration. Rank 0 prints warnings.

    Raises:
        UsageError: with every problem found, a line each.
    """
    known, former = flags(), former_names()
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    special: dict[str, str] = {"config": "gpt2-124m"}
    planned: dict[str, str] = {}
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
        elif name in PARSERS:
            planned[name] = value
        elif name in known or name in former:
            now = former.get(name, name)
            put(overrides, name, parse_value(value, known[now].annotation if now else None))
        else:
            problems.append(unknown_key(f"--{name}", name, [*known, "config", "dry-run", *PARSERS]))
    plan = PlanOptions()
    try:
        plan = plan_options(planned, dry_run=dry_run)
    except UsageError as error:
        problems.append(str(error))
    try:
        data = read_config_file(special["config"])
        overrides = migrated(overrides, "command line")
    except UsageError as error:
        raise UsageError("\n".join([str(error), *problems])) from None
    # A preset's settings are not the user's.
    given = {name: FILE for name in known if has(data, name)} if is_file(special["config"]) else {}
    for name in known:
        if has(overrides, name):
            put(data, name, get(overrides, name))
            given[name] = COMMAND_LINE
    if has(data, "train.init_from") and get(data, "train.init_from") is not None:
        # The weights have a shape; what a preset says about it does not count.
        for key in ModelConfig().shape:
            if f"model.{key}" not in given and has(data, f"model.{key}"):
                remove(data, f"model.{key}")
    # A file that sets the default may be a resolved one; then the user has named no tokenizer.
    if given.get("data.tokenizer") == FILE and get(data, "data.tokenizer") == DEFAULT_TOKENIZER:
        remove(data, "data.tokenizer")
    config = build(data, problems, given, plan.ranks)
    return Command(config, given, dry_run, plan)


def parse_value(text: str, annotation: Any) -> Any:
    """A command-line value for a setting: text as it is, anything else as YAML would read it."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    mixture = typing.get_origin(annotation) is dict and not isinstance(value, (list, dict))
    if annotation is str or mixture or (is_text(annotation) and value is not None):
        return text
    return value


def build(
    data: dict[str, Any],
    problems: list[str] | None = None,
    given: Mapping[str, str] | None = None,
    ranks: int | None = None,
) -> Config:
    """Validate nested dictionaries. Rank 0 prints warnings.

    Args:
        data: settings as a YAML file holds them.
        problems: found earlier.
        given: the settings that the user gave, and where.
        ranks: of the run; those that torchrun started by default.

    Raises:
        UsageError: listing every problem, and those in ``problems``.
    """
    problems = list(problems or [])
    warnings: list[str] = []
    config = None
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += explain(error)
    if config is not None:
        world = ranks or int(os.environ.get("WORLD_SIZE", "1"))
        refusals, warnings = unheard(config, given or {})
        problems += combination_problems(config, world) + refusals
    if problems or config is None:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    if is_rank_0():
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return config


def explain(error: ValidationError) -> list[str]:
    """One line for each key that pydantic refused: key, value and what would be valid."""
    known, lines = flags(), {}
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        # Members of a union and keys of a mapping lengthen the location: cut it to the setting.
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
            if again:  # several members of a union failed: list the choices
                lines[key] = f"{key} = {_show(item['input'])}: valid is {valid}"
        else:
            lines[key] = f"{key} = {_show(item['input'])}: expected a mapping of settings"
    return list(lines.values())


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def unknown_key(shown: str, key: str, known: list[str]) -> str:
    """``--trian.steps: no such setting; did you mean train.steps?``"""
    last = key.rpartition(".")[2]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, elsewhere or known, n=1, cutoff=0 if elsewhere else 0.5)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists them"
    return f"{shown}: no such setting{hint}"
