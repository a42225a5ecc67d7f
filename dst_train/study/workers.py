"""Processes that run the runs of a study.

Starting one takes seconds (torch, DeepSpeed), so a process takes one run after the other. A run on several ranks is the same
with a process for each rank, which find each other as those of a launcher do; no launcher is involved.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from dst_train.job import JobError, dump
from dst_train.processes import cores, start_ranks, stop, visible_gpus
from dst_train.study.grid import Run

COMMAND = (sys.executable, "-m", "dst_train.study.worker")
# A rank that is asked to stop finishes its step and writes a checkpoint.
GRACE_SECONDS = 60.0
# How long a signal may wait to be seen.
WAIT_SECONDS = 0.5
# A rank that has failed prints its traceback and exits; what it leaves behind (threads, a process group) may hold it there.
EXIT_SECONDS = 30.0


def execute(
    runs: Sequence[Run], parallel: int, received: Sequence[int], *, lock: int, command: Sequence[str] = COMMAND
) -> Generator[tuple[Run, str | None], None, None]:
    """Run all, `parallel` at a time; yields each run when it is over, with its error or None.

    It ends early once there is a signal in `received`. That, and closing it, stop what is running, at a step with a checkpoint.
    lock: a file descriptor that the processes hold open, so that the lock on it lasts as long as any of them. Where there are
    GPUs each rank has one of its own, and a run waits until as many as it has ranks are free.

    Raises:
        JobError: a run has more ranks than there are GPUs.
    """
    # In the order of their ranks: what is idle is of use to the next run, or to none.
    pending = deque(sorted(runs, key=lambda run: run.ranks))
    gpus = visible_gpus()
    for run in runs:
        if gpus and run.ranks > len(gpus):
            raise JobError(f"{run.name} is to run on {run.ranks} ranks, and this machine has {len(gpus)} GPUs")
    busy: dict[Group, Run] = {}
    idle: list[Group] = []

    def group_for(ranks: int) -> Group | None:
        """One that is idle, or a new one; None until enough GPUs are free."""
        found = next((group for group in idle if group.ranks == ranks), None)
        if found is not None:
            idle.remove(found)
            return found
        stop_groups(idle, GRACE_SECONDS)
        idle.clear()
        taken = {gpu for group in busy for gpu in group.gpus}
        free = [gpu for gpu in gpus if gpu not in taken]
        if gpus and len(free) < ranks:
            return None
        return Group(ranks, max(1, cores() // (parallel * ranks)), lock, command, free[:ranks])

    try:
        while (pending or busy) and not received:
            while pending and len(busy) < parallel and (group := group_for(pending[0].ranks)) is not None:
                busy[group] = pending[0]
                group.start(pending.popleft())
            ready = wait([pipe for group in busy for pipe in group.awaited], WAIT_SECONDS)
            for group in [g for g in busy if g.take_answers(ready)]:
                run = busy.pop(group)
                if group.error is None and run.job.deepspeed.zero_optimization.stage == 3:
                    stop_groups([group], GRACE_SECONDS)  # DeepSpeed never lets go of such an engine
                elif group.error is None:
                    idle.append(group)
                yield run, group.error
    finally:
        stop_groups([*busy, *idle], GRACE_SECONDS)


class Group:
    """A process for each rank, which run one job together at a time.

    awaited: file descriptors of the ranks that have not answered yet. error: why the run failed; such a group is gone. gpus: see
    `start_ranks`.
    """

    def __init__(self, ranks: int, threads: int, lock: int, command: Sequence[str], gpus: Sequence[str] = ()) -> None:
        self.ranks = ranks
        self.gpus = gpus
        self.error: str | None = None
        self.awaited: set[int] = set()
        self.processes = start_ranks(
            command,
            ranks,
            threads=str(threads),
            gpus=gpus,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C is for the study, which asks them to stop
        )

    def start(self, run: Run) -> None:
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "job.yaml").write_text(dump(run.job), encoding="utf-8")
        self._directory = run.directory
        for rank, process in enumerate(self.processes):
            self._output(rank).unlink(missing_ok=True)  # of an attempt before: its error would be taken for this one's
            with suppress(BrokenPipeError):  # one that has died meanwhile shows in take_answers
                print(run.directory, file=_pipe(process.stdin), flush=True)
        self.awaited = {_pipe(process.stdout).fileno() for process in self.processes}

    def take_answers(self, ready: Sequence[Any]) -> bool:
        """Takes the answers that are there. True when the run is over: every rank finished it, or one has ended."""
        for rank, process in enumerate(self.processes):
            pipe = _pipe(process.stdout)
            if pipe.fileno() in self.awaited and pipe.fileno() in ready:
                self.awaited.remove(pipe.fileno())
                if not pipe.readline():
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(EXIT_SECONDS)
                    self.error = _describe(process.returncode, self._output(rank))
                    stop_groups([self], 0.0)  # the others wait for the one that ended
                    return True
        return not self.awaited

    def _output(self, rank: int) -> Path:
        return self._directory / f"output-{rank}.txt"


def stop_groups(groups: Sequence[Group], grace: float) -> None:
    workers = [process for group in groups for process in group.processes]
    stop(workers, grace)
    for process in workers:
        _pipe(process.stdout).close()
        with suppress(BrokenPipeError):
            _pipe(process.stdin).close()


def _describe(code: int | None, output: Path) -> str:
    """How a process ended: its last line (of a traceback, the error), and where the rest is."""
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n") if output.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    if code is None:
        how = "hung at its exit"
    else:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{last} ({how}; see {output})"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # every process is started with both
    return pipe
