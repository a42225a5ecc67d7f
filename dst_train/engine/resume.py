"""May this job continue that checkpoint? The differences, and which of them would change its meaning."""

from __future__ import annotations

from typing import Any

from dst_train.job import differences
from dst_train.job.resumable import may_change

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
        # Stage 0 keeps its masters elsewhere.
        free = may_change(change.key) or (change.key == STAGE and 0 not in (change.old, change.new))
        (allowed if free else refused).append(str(change))
    if refused:
        raise JobChangedError(
            "the job is not the one that wrote the checkpoint: "
            + "; ".join(refused)
            + ". Change it back, or give the job another name, under which it starts anew"
        )
    return allowed
