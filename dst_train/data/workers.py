"""Worker processes that neither take part in signals nor outlive the training."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

_started: list[BaseProcess] = []


def ignore_signals(worker_id: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a job, but the training still needs samples for the step
    that it finishes before it saves. Workers end with the loader, or with the process that started them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def recorded() -> Iterator[None]:
    """Processes started in the block are killed when the interpreter ends: multiprocessing would wait for them forever,
    as it only sends a SIGTERM."""
    before = set(multiprocessing.active_children())
    yield
    _started[:] = [process for process in _started if process.is_alive()]
    _started.extend(set(multiprocessing.active_children()) - before)


@atexit.register
def kill_started() -> None:
    for process in _started:
        process.kill()
