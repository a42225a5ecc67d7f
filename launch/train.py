"""What `deepspeed` (or torchrun, or plain python) starts on each rank: `deepspeed launch/train.py --job jobs/NAME.yaml`."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a job.")
    parser.add_argument("--job", required=True, help="the job's YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key of the job"
    )
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="end after this optimiser step with a checkpoint")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher, not used")
    args = parser.parse_args()

    from dst_train.monitor import quiet_libraries

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    quiet_libraries(rank)
    from dst_train.job import JobError, load
    from dst_train.plan import prepare

    try:
        job = load(args.job, args.overrides)
        prepare(job, world_size)
    except JobError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return 2

    from dst_train.engine import leave_distributed, run

    outcome = run(job, stop_at=args.stop_at)
    if rank == 0:
        accuracy = outcome.evaluation.get("accuracy")
        result = "" if accuracy is None else f", accuracy {accuracy:.2%}"
        state = "finished" if outcome.finished else "stopped, run the same command to continue"
        print(f"{state} at step {outcome.step}{result}")
        print(f"run directory: {outcome.run_directory}")
        print(f"tensorboard --logdir {outcome.run_directory / 'tensorboard'}", flush=True)
    leave_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
