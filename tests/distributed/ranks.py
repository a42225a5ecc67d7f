"""Runs a function on several gloo ranks and brings back what each returned or raised."""

from __future__ import annotations

import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests import processes


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 120.0) -> list[Any]:
    """Results of function(*args) by rank; function must be importable. Inside, torch.distributed is not yet initialised.

    Raises:
        RuntimeError: a rank raised; all tracebacks are in the message. TimeoutError: naming the ranks that did not end.
    """
    context = processes.context()
    results = context.Queue()
    port = processes.free_port()
    started = [
        context.Process(target=_main, args=(r, world_size, port, results, function, args)) for r in range(world_size)
    ]
    for process in started:
        process.start()
    done: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + seconds
    try:
        while len(done) < world_size and time.monotonic() < deadline:
            try:
                rank, ok, value = results.get(timeout=1.0)
                done[rank] = (ok, value)
            except queue.Empty:
                if any(p.exitcode not in (None, 0) and r not in done for r, p in enumerate(started)):
                    break
    finally:
        for process in started:
            process.join(timeout=10.0 if len(done) == world_size else 0.1)
            process.kill()
    failed = [f"rank {r}:\n{value}" for r, (ok, value) in sorted(done.items()) if not ok]
    if failed:
        raise RuntimeError("\n".join(failed))
    missing = sorted(set(range(world_size)) - set(done))
    if missing:
        codes = [started[r].exitcode for r in missing]
        raise TimeoutError(f"ranks {missing} did not return within {seconds} s (exit codes {codes})")
    return [pickle.loads(done[r][1]) for r in range(world_size)]


def _main(
    rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        import torch

        torch.set_num_threads(1)
        # As bytes: a tensor in a queue is a handle into the sender's memory, gone when that ends.
        results.put((rank, True, pickle.dumps(function(*args))))
    except BaseException:  # noqa: BLE001  (the parent raises it again)
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
