"""A rank of a training: `python -m dst_train.train --job jobs/NAME.yaml`, which launch/train.py is as a script."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time

from dst_train.processes import launcher_problem

PATIENCE = 10.0  # seconds


def refuse(error: Exception, rank: int, *, speaks: bool) -> int:
    """Says what is wrong and returns the exit code.

    A launcher ends all processes of its node as soon as one has failed. So a rank that is not to speak waits until that
    happens to it: one that is quicker than the rank that speaks would end it before it has said anything. After PATIENCE it
    says it itself: better twice than never.
    """
    if not speaks:
        time.sleep(PATIENCE)
    print(error if rank == 0 else f"rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr)
    return 2


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a job.")
    parser.add_argument("--job", required=True, help="the job's YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key of the job"
    )
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="end after this optimiser step with a checkpoint")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher, not used")
    args = parser.parse_args()

    if (why := launcher_problem()) is not None:
        print(why, file=sys.stderr)
        return 2
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    from dst_train.monitor import quiet_libraries

    quiet_libraries(rank)
    from dst_train.job import JobError, load, locate
    from dst_train.plan import prepare

    try:
        job = load(args.job, args.overrides)
        prepare(job, world_size)
    except JobError as error:
        # Nodes may differ in files and environment, ranks of a node do not.
        error = locate(error, args.job, args.overrides)
        return refuse(error, rank, speaks=int(os.environ.get("LOCAL_RANK", 0)) == 0)

    from dst_train.engine import CheckpointError, JobChangedError, run, shutdown_distributed

    try:
        outcome = run(job, stop_at=args.stop_at)
    except (CheckpointError, JobChangedError) as error:  # the same on every rank, and before the first step
        code = refuse(error, rank, speaks=rank == 0)
        shutdown_distributed(together=False)
        return code
    if rank == 0:
        accuracy = outcome.evaluation.get("accuracy")
        result = "" if accuracy is None else f", accuracy {accuracy:.2%}"
        state = "finished" if outcome.finished else "stopped, run the same command to continue"
        print(f"{state} at step {outcome.step}{result}")
        print(f"run directory: {outcome.run_directory}")
        print(f"tensorboard --logdir {outcome.run_directory / 'tensorboard'}", flush=True)
    shutdown_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
