"""Ends a rank that hangs, and says where: all others wait for it, and none of them could tell what for."""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class _Task:
    """Compared by identity: what has the same name may begin again."""

    name: str


class Watchdog:
    """Ends the process, after the stacks of its threads, when what was begun takes longer than `minutes`.

    Each rank has one. A rank that hangs stops the others in their next collective, so that all of them end and the launcher is
    free to start anew. Each prints its own stacks: the one that is not inside of a collective is the one that hangs. Time in which nothing was begun does not count, nor does time in
    which the whole process was suspended.
    """

    def __init__(self, rank: int, minutes: float) -> None:
        self._rank = rank
        self._minutes = minutes
        self._begun: _Task | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, what: str) -> None:
        """From now on it is `what` that must end in time; what was begun before has ended."""
        self._begun = _Task(what)

    def rest(self) -> None:
        """What was begun has ended."""
        self._begun = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        limit = 60.0 * self._minutes
        interval = min(1.0, limit / 4)
        begun, taken, looked = self._begun, 0.0, time.monotonic()
        while not self._closed.wait(interval):
            passed, looked = time.monotonic() - looked, time.monotonic()
            if self._begun is not begun:
                begun, taken = self._begun, 0.0
            else:
                taken += min(passed, 2 * interval)  # more, and this thread did not run either
            if begun is not None and taken > limit:
                text = (
                    f"rank {self._rank} on {socket.gethostname()}: {begun.name} has not ended after {self._minutes:g} minutes "
                    "(monitor.hang_minutes); the stacks of its threads:\n"
                )
                os.write(2, text.encode())  # not sys.stderr, whose lock a thread that hangs may hold
                faulthandler.dump_traceback(file=2)
                os._exit(1)
