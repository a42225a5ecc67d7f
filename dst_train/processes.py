"""The ranks of a run on this machine: starting them, waiting for them, stopping them, and what each does when asked to stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# What starts many processes sets one of these; only deepspeed and torchrun also set RANK.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# What a rank has to know.
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What asks a training to save and end.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A rank waits in a collective for one that has failed, and does not heed SIGTERM there.
EXIT_SECONDS = 10.0


def launcher_problem() -> str | None:
    """Why this process cannot find the others of which it is one, or None."""
    missing = [name for name in PLACE if name not in os.environ]
    if "RANK" in os.environ and missing:
        return f"RANK is set and {', '.join(missing)} not; start ranks with deepspeed or torchrun, or set {', '.join(PLACE)} for each"
    for name in COUNTS:
        if "RANK" not in os.environ and int(os.environ.get(name, 1)) > 1:
            return (
                f"{name} is {os.environ[name]} and RANK is not set: each process would train alone, into one run directory. "
                "Start one process a node with deepspeed or torchrun, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
                "MASTER_PORT for each"
            )
    return None


def visible_gpus() -> list[str]:
    """The GPUs that ranks may use, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def start_ranks(
    command: Sequence[str], ranks: int, *, threads: str, gpus: Sequence[str] = (), **options: Any
) -> list[subprocess.Popen[str]]:
    """A process for each rank, which find each other by the variables that a launcher would set.

    Args:
        threads: of each process, for OMP_NUM_THREADS.
        gpus: of `visible_gpus`, those of these ranks; all if none are named.
        options: of Popen.
    """
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    if gpus:
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    started: list[subprocess.Popen[str]] = []
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env={**shared, **place}, text=True, **options))
    except BaseException:
        stop(started, 0.0)
        raise
    return started


def run_ranks(command: Sequence[str], ranks: int) -> int:
    """Run a command on all ranks, to which SIGINT, SIGTERM and SIGUSR1 are handed on; returns its exit code.

    What they do of it may take any time: a step, and a checkpoint. When a rank fails, the others are ended, and the exit code is
    that of the one that failed, or 128 + the signal that killed it.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // ranks))
    with signals() as received:
        processes = start_ranks(command, ranks, threads=threads)
        try:
            while True:
                while received:
                    number = received.pop()
                    for process in processes:
                        process.send_signal(number)
                codes = [process.poll() for process in processes]
                failed = next((code for code in codes if code), 0)
                if failed or None not in codes:
                    return failed if failed >= 0 else 128 - failed
                time.sleep(0.1)
        finally:
            stop(processes, EXIT_SECONDS)


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list to which SIGTERM, SIGINT and SIGUSR1 are added as they come, instead of ending the process."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in STOPS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop(processes: Sequence[subprocess.Popen[str]], grace: float) -> None:
    """Ask all processes to stop, and kill those that have not after `grace` seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cores() -> int:
    """Cores that this process may use; a container or a batch system may leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
