"""The two ways a command fails, and how it says so: one line on standard error, no traceback.

`Parser` and `at_least` let argparse do the same.

``GPT_DIST_TRACEBACK=1`` prints the traceback as well.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

PATIENCE = 5.0
"""Seconds that the other ranks leave rank 0 to print an error."""


class GptDistError(Exception):
    """Something went wrong while running: exit status 1."""

    exit_status = 1
    local = False
    """Whether only this rank knows of it, so that this rank prints the message."""


class UsageError(GptDistError):
    """The command was asked for something it cannot do: exit status 2."""

    exit_status = 2


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, and the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Raise a ``UsageError``."""
        if unknown := re.fullmatch(r"unrecognized arguments: (--[^ =]+)(.*)", message):
            close = difflib.get_close_matches(unknown[1], self._options(), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"{unknown[1]}: no such option{hint}"
        raise UsageError(f"{message} ({self.prog} --help)")

    def _options(self) -> Iterator[str]:
        """Long options, also those of subcommands."""
        for action in self._actions:
            yield from (name for name in action.option_strings if name.startswith("--"))
            if isinstance(action, argparse._SubParsersAction):
                for parser in set(action.choices.values()):
                    yield from parser._options()


def at_least(least: float, kind: type, most: float = float("inf")) -> Callable[[str], Any]:
    """The type of an option that is a number from ``least`` to ``most``, for argparse."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (least <= value <= most and value < float("inf")):
            wanted = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def run_main(
    main: Callable[[], int | None], on_usage_error: Callable[[], None] | None = None
) -> None:
    """Run a command's ``main`` and exit; expected errors become one line and an exit status.

    Under torchrun all ranks raise the same error and rank 0 prints it. The others wait a little
    before they exit, because torchrun kills all ranks of a node as soon as one has failed, and the
    message must be out by then. On a host without rank 0, local rank 0 then prints what went wrong
    before the ranks were connected: it may be wrong on that host alone.

    Args:
        main: the command; returns its exit status (None is 0).
        on_usage_error: called after a usage error was printed.
    """
    try:
        status = main() or 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # `… | head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (GptDistError, OSError) as error:
        status = error.exit_status if isinstance(error, GptDistError) else 1
        printed = print_error(error)
        if isinstance(error, UsageError) and on_usage_error:
            on_usage_error()
        if "TORCHELASTIC_RUN_ID" in os.environ and not printed:
            time.sleep(PATIENCE)
            if os.environ.get("LOCAL_RANK") == "0" and not connected():
                print(f"error on {socket.gethostname()}: {describe(error)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A thread that waits in torch's store would abort the interpreter's orderly shutdown.
        os._exit(status)
    sys.exit(status)


def connected() -> bool:
    """Whether the ranks can agree on what went wrong; only then do all know of it."""
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_initialized())


def is_rank_0() -> bool:
    """Whether this process is world rank 0 as torchrun numbers them, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


def print_error(error: GptDistError | OSError) -> bool:
    """Print an error if this rank is to do so; returns whether it is."""
    speaks = is_rank_0() or getattr(error, "local", False)
    # Also on the rank where it arose: the others only know the message.
    if os.environ.get("GPT_DIST_TRACEBACK", "0") not in ("", "0") and (speaks or error.__cause__):
        traceback.print_exception(error)
    if speaks:
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
    return speaks


def describe(error: BaseException) -> str:
    """One line for people; an ``OSError`` names the file it is about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
