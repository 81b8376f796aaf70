"""When a collective fails, say which rank on which host no longer answers.

The errors of gloo and NCCL name an address at best, and the wrong one when a rank fails only
because its neighbour did. So every rank keeps a thread that waits for a key in the rendezvous
store. A rank whose collective failed sets that key, and a rank that does not answer is lost. A
healthy run has no traffic for this.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from gpt_dist.errors import GptDistError
from gpt_dist.parallel.rendezvous import connect
from gpt_dist.parallel.watchdog import watch_agent

PATIENCE = 2.0
"""Seconds to wait for answers; a healthy process answers within milliseconds."""


class RollCall:
    """Answers when another rank asks who is there, and asks. Constructing one is collective.

    Args:
        rank: this rank.
        size: ranks in all.
        prefix: of this start's keys, from ``rendezvous.meet``.
    """

    def __init__(self, rank: int, size: int, prefix: str) -> None:
        self.rank, self.size = rank, size
        self._prefix = f"{prefix}/roll-call"
        self._store = connect()
        self._store.set(f"{self._prefix}/host/{rank}", socket.gethostname())
        self._first_host = self._store.get(f"{self._prefix}/host/0").decode()
        self._failed = False
        threading.Thread(target=self._answer, name="roll-call", daemon=True).start()

    def explain(self, error: BaseException) -> GptDistError:
        """Turn the failure of a collective into one line that names the lost ranks.

        Every rank calls this; the error's ``local`` is set on the rank that should print it.
        """
        self._failed = True
        places = self._call()
        missing = [rank for rank, (_, place) in places.items() if place is None]
        if not places:
            text = (
                f"lost the connection to {self._first_host} ({os.environ['MASTER_ADDR']}), the "
                "host of rank 0: the host or the network between is down"
            )
        elif missing:
            text = "lost " + ", ".join(f"rank {rank} on {places[rank][0]}" for rank in missing[:8])
            text += f" and {len(missing) - 8} more" * (len(missing) > 8)
            text += ": dead, stopped, or cut off from the network"
        else:
            text = "a collective failed although all ranks answer: " + "; ".join(
                f"rank {rank} on {host} was in {place}"
                for rank, (host, place) in list(places.items())[:8]
            )
        reason = re.sub(r"^\[\S+\] |\. This is typically.*", "", " ".join(str(error).split()))
        result = GptDistError(f"{text} ({reason[:200]}); run the same command to resume")
        if not places:
            result.local = int(os.environ.get("LOCAL_RANK", "0")) == 0
            if result.local:
                watch_agent()
        else:
            result.local = self.rank == min(set(places) - set(missing), default=self.rank)
        return result

    def _answer(self) -> None:
        try:
            self._store.wait([f"{self._prefix}/call"], timedelta(days=365))
            place = "a collective" if self._failed else whereabouts()
            self._store.set(f"{self._prefix}/place/{self.rank}", place)
        except RuntimeError:  # the store closed with its host, or at the end of the run
            return

    def _call(self) -> dict[int, tuple[str, str | None]]:
        """Rank → its host and where in the program it is, None if it does not answer.

        Empty if the store does not answer.
        """
        answers: queue.Queue[dict[int, tuple[str, str | None]]] = queue.Queue()

        def call() -> None:
            with contextlib.suppress(RuntimeError):  # no store, no answer
                answers.put(self._ask(connect()))

        # In a thread: if the network is down, a call to the store blocks for minutes.
        threading.Thread(target=call, daemon=True).start()
        try:
            return answers.get(timeout=2 * PATIENCE)
        except queue.Empty:
            return {}

    def _ask(self, store: Any) -> dict[int, tuple[str, str | None]]:
        def read(key: str) -> str | None:
            return store.get(key).decode() if store.check([key]) else None

        store.set(f"{self._prefix}/call", "")
        time.sleep(PATIENCE)
        return {
            rank: (
                read(f"{self._prefix}/host/{rank}") or "a host that never came",
                read(f"{self._prefix}/place/{rank}"),
            )
            for rank in range(self.size)
        }


def whereabouts() -> str:
    """The line of this package that the main thread is at, such as ``loader.py:61 (step)``."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    package = str(Path(__file__).parents[1])
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(package):
            return f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return "start-up"
