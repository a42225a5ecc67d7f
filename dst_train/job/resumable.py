"""Which keys of a job may change when its run is resumed."""

from __future__ import annotations

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


def may_change(key: str) -> bool:
    """key: dotted."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in MAY_CHANGE)
