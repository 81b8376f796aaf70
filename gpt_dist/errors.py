"""The two ways a command fails, and how it says so: one line on stderr, never a traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable


class GptDistError(Exception):
    """Something went wrong while running: exit status 1."""

    exit_status = 1
    local = False
    """Whether only this rank knows, so that it prints the message itself."""


class UsageError(GptDistError):
    """The command was asked for something it cannot do: exit status 2."""

    exit_status = 2


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit; expected errors become one line and an exit status.

    Under torchrun every rank meets the same usage error, but only rank 0 prints it. The others
    wait a little before they exit, because torchrun kills all workers as soon as one fails and
    the message must be out by then.
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
        if int(os.environ.get("RANK", "0")) == 0 or getattr(error, "local", False):
            print(f"error: {describe(error)}", file=sys.stderr, flush=True)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(5)
    sys.stdout.flush()
    sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A thread that waits in torch's store would abort the interpreter's orderly shutdown.
        os._exit(status)
    sys.exit(status)


def describe(error: BaseException) -> str:
    """One line for people; an ``OSError`` names the file it is about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
