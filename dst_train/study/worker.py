"""A rank that takes one run of a study after the other: `python -m dst_train.study.worker`.

Reads run directories from stdin, one a line, each with the job.yaml to run; answers `finished` on stdout when its
result.json is there. Whatever is printed meanwhile goes to output-<rank>.txt of the run. An error ends the process: what a
failed run left behind must not touch the next one.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    rank = int(os.environ["RANK"])
    facts: dict[str, Any] = {}
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            directory = Path(line.rstrip("\n"))
            _print_into(directory / f"output-{rank}.txt")
            facts = facts or _facts(rank)
            _run(directory, rank, facts)
            gc.collect()  # engines and models are cycles
            import torch

            torch.cuda.empty_cache()  # of which the next run may have another use, and other processes have none
            print("finished", file=answers, flush=True)
    if facts:
        from dst_train.engine import shutdown_distributed

        shutdown_distributed()


def _print_into(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _facts(rank: int) -> dict[str, Any]:
    """What all results of this process share. The revision is that of the code as it was imported, so it is asked for once."""
    from dst_train.monitor import environment, quiet_libraries

    quiet_libraries(rank)
    facts = environment()
    return {
        "git": facts["git"],
        "machine": ", ".join(sorted(set(facts["devices"]))) or facts["cpu"],
        "torch": facts["packages"]["torch"],
        "threads": facts["cpu_threads"],
    }


def _run(directory: Path, rank: int, facts: dict[str, Any]) -> None:
    from dst_train.engine import run
    from dst_train.job import load
    from dst_train.study import grid, results

    job = load(directory / "job.yaml")
    started = time.perf_counter()
    outcome = run(job)
    seconds = time.perf_counter() - started
    if not outcome.finished:
        sys.exit(f"stopped by a signal at step {outcome.step}; the same command continues it")
    if rank == 0:
        result = results.Result(
            evaluation=outcome.evaluation,
            steps=outcome.step,
            seconds=round(seconds, 2),
            job_digest=grid.fingerprint(job),
            ranks=int(os.environ["WORLD_SIZE"]),
            **facts,
        )
        results.write(directory, result)


if __name__ == "__main__":
    main()
