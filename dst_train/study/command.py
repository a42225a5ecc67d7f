"""The command: run what is missing, say how it goes, keep the outputs up to date."""

from __future__ import annotations

import datetime
import fcntl
import importlib.util
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from dst_train.job import JobError
from dst_train.processes import signals
from dst_train.study import report, results, workers
from dst_train.study.grid import Grid, Run, build

INTERRUPTED = 130
STOPPED = "stopped; the same command continues"


def run_study(
    path: Path, *, out: Path | None = None, only_table: bool = False, command: Sequence[str] = workers.COMMAND
) -> int:
    """Run a study from start, or from what is there of it, to its end.

    Args:
        out: a folder that gets a copy of the outputs; nothing to do when it is the study's own.
        only_table: write the outputs from what is there, and run nothing.
        command: of a worker.

    Returns the exit code: 0, 1 when a run failed, 130 after Ctrl-C or, once runs have started, SIGTERM or SIGUSR1.

    Raises:
        JobError: the study cannot be run as written, or holds results of other jobs.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise JobError("a study draws a plot with matplotlib, which is not installed: pip install matplotlib")
    grid = build(path)
    for folder in (grid.folder, *([] if out is None else [out])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JobError(f"{folder}: cannot be made: {error}") from error
    report.write(grid, results.read_all(grid.runs))
    code = 0
    if not only_table:
        with _locked(grid.folder) as lock:
            code = _run(grid, lock, command)
        report.write(
            grid, results.read_all(grid.runs)
        )  # runs that ended while the study was being stopped are in it, too
    print(f"{(grid.folder / 'table.md').read_text(encoding='utf-8')}\noutputs: {grid.folder}")
    if out is not None and not out.samefile(grid.folder):
        for name in report.FILES:
            shutil.copyfile(grid.folder / name, out / name)
    return code


def _run(grid: Grid, lock: int, command: Sequence[str]) -> int:
    found = results.read_all(grid.runs)
    pending = [run for run in grid.runs if run.name not in found]
    results.check_unfinished(pending)
    failed: dict[str, str] = {}
    try:
        if pending:
            _prepare(pending)  # may take minutes, with nothing to save: a signal ends it as it would any program
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return INTERRUPTED
    # Noted, not raised: Python drops an exception that a handler raises within a __del__ or a callback of its collector.
    with signals() as received:
        with closing(workers.execute(pending, grid.study.parallel, received, lock=lock, command=command)) as over:
            _follow(grid, over, len(pending), failed)
        if received:
            print(STOPPED, file=sys.stderr)
    for name, error in failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    return INTERRUPTED if received else int(bool(failed))


def _follow(grid: Grid, over: Iterator[tuple[Run, str | None]], pending: int, failed: dict[str, str]) -> None:
    """A line for each run that is over, and the outputs rewritten."""
    started, total = time.perf_counter(), len(grid.runs)
    for count, (run, error) in enumerate(over, 1):
        left = datetime.timedelta(seconds=round((time.perf_counter() - started) / count * (pending - count)))
        place = f"[{total - pending + count}/{total}] {run.name}"
        if error is not None:
            failed[run.name] = error
            print(f"{place}  FAILED  {left} left", flush=True)
            continue
        found = results.read_all(grid.runs)
        report.write(grid, found)
        result = found[run.name]
        measured = f"accuracy {result.evaluation['accuracy']:.2%}  loss {result.evaluation['loss']:.4f}"
        print(f"{place}  {measured}  {result.seconds:.0f} s  {left} left", flush=True)


def _prepare(pending: Sequence[Run]) -> None:
    """Refuses before anything runs what a plan would refuse; builds the op and the shards' indexes once for all workers."""
    from dst_train.plan import prepare  # imports torch

    for run in {run.points: run for run in pending}.values():
        try:
            prepare(run.job, run.ranks)
        except JobError as error:
            raise JobError(f"{'-'.join(run.points[0])}: {run.locate(error)}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Holds the folder of a study for this process and its workers."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobError(
                f"{folder}: this study is running already, or a run of one that was killed has yet to end"
            ) from error
        yield file.fileno()
