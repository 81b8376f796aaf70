"""The lines of a token file: a bearer token each, and what its caller may use."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from gpt_dist.errors import GptDistError
from serve.engine.callers import Terms

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VALID = "name=NAME, weight=NUMBER, running=COUNT and waiting=COUNT"
MAX_WEIGHT = 1000.0


def parse_tokens(data: bytes, where: str) -> list[tuple[bytes, Terms]]:
    """Parse a token file. Blank lines and comments (``#``) are skipped.

    Args:
        data: lines ``TOKEN [name=NAME] [weight=NUMBER] [running=COUNT] [waiting=COUNT]``. Tokens
            with the same name are one caller's.
        where: names the file in errors, which do not show tokens.

    Raises:
        GptDistError: a line is not valid.
    """
    found: list[tuple[bytes, Terms]] = []
    for number, line in enumerate(data.splitlines(), 1):
        token, *options = line.split()[:9] or [b""]
        if not token or token.startswith(b"#"):
            continue
        if any(token == other for other, _ in found):
            raise GptDistError(f"{where}, line {number}: the token is there twice")
        terms = Terms()
        for option in options:
            terms = _with(terms, option.decode(errors="replace"), f"{where}, line {number}")
        found.append((token, terms))
    return found


def _with(terms: Terms, option: str, where: str) -> Terms:
    name, _, value = option.partition("=")
    match name:
        case "name" if NAME.fullmatch(value):
            return replace(terms, name=value)
        case "name":
            raise GptDistError(
                f"{where}: name={value[:80]}: must have 1 to 64 letters, digits, dots, underscores "
                "and hyphens"
            )
        case "weight":
            try:
                weight = float(value)
            except ValueError:
                weight = math.nan
            if not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT:
                raise GptDistError(
                    f"{where}: weight={value[:80]}: must be {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
                )
            return replace(terms, weight=weight)
        case "running" | "waiting":
            least = 1 if name == "running" else 0
            if not (value.isascii() and value.isdecimal() and least <= int(value[:9])):
                raise GptDistError(
                    f"{where}: {name}={value[:80]}: must be a whole number from {least}"
                )
            count = int(value[:9])
            if name == "running":
                return replace(terms, running=count)
            return replace(terms, waiting=count)
    shown = f"{name[:80]}=" if "=" in option else "a word without ="
    raise GptDistError(f"{where}: {shown} after the token: valid are {VALID}")
