"""What goes wrong with data, by name."""

from __future__ import annotations

from dst_train.job import JobError


class DataError(JobError):
    """Shards or samples are not what the job says. The message names the shard and, where there is one, the member."""


class BadSampleError(DataError):
    """One sample cannot be read or decoded. Training may replace it, see `data.max_bad_samples`."""
