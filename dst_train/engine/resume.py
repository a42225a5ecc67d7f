"""May this job continue that checkpoint? The differences, and which of them would change its meaning."""

from __future__ import annotations

from typing import Any

from dst_train.job import differences

# Everything else shapes the weights, the order of samples or the schedules of the run being continued.
MAY_CHANGE = (
    "run_root",
    "data.train.shards",
    "data.eval",
    "data.num_workers",
    "data.max_bad_samples",
    "data.cache_dir",
    "data.in_memory",
    "train.max_skipped_steps",
    "train.micro_batch_size",
    "evaluate",
    "checkpoint",
    "monitor",
    "deepspeed.zero_optimization.overlap_comm",
    "deepspeed.zero_optimization.reduce_bucket_size",
    "deepspeed.zero_optimization.allgather_bucket_size",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold",
)
STAGE = "deepspeed.zero_optimization.stage"


class JobChangedError(RuntimeError):
    """The job differs from that of the checkpoint in a way that would change what the checkpoint means."""


def check_job(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The differences that are allowed, as `key: old -> new`, from the canonical forms of two jobs.

    Raises:
        JobChangedError: naming every difference that is not.
    """
    allowed: list[str] = []
    refused: list[str] = []
    for change in differences(saved, current):
        free = any(change.key == prefix or change.key.startswith(prefix + ".") for prefix in MAY_CHANGE)
        free = free or (
            change.key == STAGE and 0 not in (change.old, change.new)
        )  # stage 0 keeps its masters elsewhere
        (allowed if free else refused).append(str(change))
    if refused:
        raise JobChangedError(
            "the job is not the one that wrote the checkpoint: "
            + "; ".join(refused)
            + ". Change it back, or give the job another name, under which it starts anew"
        )
    return allowed
