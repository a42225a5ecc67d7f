"""Batch arithmetic: global batch = micro batch x accumulation x ranks."""

from __future__ import annotations

from dataclasses import dataclass

from dst_train.job.errors import JobError
from dst_train.job.schema import Job


@dataclass(frozen=True)
class BatchPlan:
    """How a job's global batch is cut on `world_size` ranks, and how many optimiser steps it has.

    `accumulation`: micro-batches per optimiser step and rank. An epoch has `steps_per_epoch` whole batches; the samples
    that do not fill one are left out, other ones in each epoch.
    """

    batch_size: int
    micro_batch_size: int
    accumulation: int
    world_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, job: Job, world_size: int) -> BatchPlan:
        """
        Raises:
            JobError: the batch does not divide (listing the micro batches that do), exceeds the data, or the warm-up
                is longer than the training.
        """
        batch, micro = job.train.batch_size, job.train.micro_batch_size
        if batch % world_size:
            raise JobError(
                f"train.batch_size {batch} does not divide by {world_size} ranks; use a multiple of {world_size}, of "
                f"micro_batch_size x ranks = {micro * world_size} if train.micro_batch_size is to stay {micro}",
                ("train", "batch_size"),
            )
        if batch > job.data.train.samples:
            raise JobError(
                f"train.batch_size {batch} is larger than data.train.samples {job.data.train.samples}",
                ("train", "batch_size"),
            )
        share = batch // world_size
        if share % micro:
            fitting = [str(m) for m in range(1, share + 1) if share % m == 0]
            raise JobError(
                f"train.micro_batch_size {micro} does not divide the {share} samples that each of {world_size} ranks takes "
                f"of train.batch_size {batch}; these do: {', '.join(fitting)}",
                ("train", "micro_batch_size"),
            )
        per_epoch = job.data.train.samples // batch
        total = job.train.steps if job.train.steps is not None else (job.train.epochs or 0) * per_epoch
        warmup = job.schedule.warmup_epochs * per_epoch
        if not round(min(warmup, total)) < total:
            raise JobError(
                f"schedule.warmup_epochs {job.schedule.warmup_epochs} is {warmup:.0f} steps, and the training has only {total}",
                ("schedule", "warmup_epochs"),
            )
        return cls(batch, micro, share // micro, world_size, per_epoch, total, round(warmup))

    def __str__(self) -> str:
        return (
            f"{self.batch_size} samples per step = {self.micro_batch_size} x {self.accumulation} accumulated x "
            f"{self.world_size} ranks; {self.steps_per_epoch} steps per epoch, {self.total_steps} steps, "
            f"{self.warmup_steps} of them warm-up"
        )
