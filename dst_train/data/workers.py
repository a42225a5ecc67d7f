"""Worker processes that neither take part in signals nor outlive the training."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

from dst_train.processes import STOPS

_started: list[BaseProcess] = []


def ignore_signals(worker_id: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a job, but the training still needs samples for the step
    that it finishes before it saves. Workers end with the loader, or with the process that started them."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextmanager
def recorded() -> Iterator[None]:
    """Processes started in the block are killed when the interpreter ends: multiprocessing would wait for them forever,
    as it only sends a SIGTERM. They start with signals blocked, as it takes them seconds to come to `ignore_signals`."""
    before = set(multiprocessing.active_children())
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        resource_tracker.ensure_running()  # not in the block: whoever starts it has SIGINT and SIGTERM unblocked after it
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    _started[:] = [process for process in _started if process.is_alive()]
    _started.extend(set(multiprocessing.active_children()) - before)


@atexit.register
def kill_started() -> None:
    for process in _started:
        process.kill()
