"""The declarative job: what it may say, how it is read, and the arithmetic of its batches."""

from dst_train.job.batch import BatchPlan
from dst_train.job.differences import Difference, differences
from dst_train.job.errors import JobError, Key
from dst_train.job.loader import digest, dump, load, locate
from dst_train.job.reference import reference_markdown
from dst_train.job.schema import Job, Rule, Split
from dst_train.job.schema_json import schema_json

__all__ = [
    "BatchPlan",
    "Difference",
    "Job",
    "JobError",
    "Key",
    "Rule",
    "Split",
    "differences",
    "digest",
    "dump",
    "load",
    "locate",
    "reference_markdown",
    "schema_json",
]
