"""The batches of a job on one rank."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dst_train.data.dataset import Batch, EvalBatch, EvalSet, TrainSet, samples
from dst_train.data.errors import DataError
from dst_train.data.order import EvalOrder, TrainOrder
from dst_train.data.shards import local_shards
from dst_train.data.store import SampleStore
from dst_train.data.workers import ignore_signals, recorded
from dst_train.job import BatchPlan
from dst_train.job.schema import Job, Split

T = TypeVar("T")


def train_loader(job: Job, plan: BatchPlan, *, rank: int, start_step: int = 0) -> Iterator[Batch]:
    """Micro-batches of `rank`, from micro-batch 0 of optimiser step `start_step` to the end of step `total_steps` - 1.

    What a step takes, augmentation included, depends on (seed, step) only: not on `start_step`, the number of ranks or
    of workers. Shards are checked, and remote ones copied, before this returns.

    Raises DataError (a JobError) for missing, damaged or miscounted shards, here; and from the iterator for a sample
    that cannot be decoded when `data.max_bad_samples` is 0. ValueError if rank or start_step is out of range.
    """
    _check_rank(rank, plan)
    if not 0 <= start_step <= plan.total_steps:
        raise ValueError(f"start_step is {start_step}, must be 0 to {plan.total_steps} (total_steps)")
    store = _open(job.data.train, job.data.cache_dir)
    dataset = TrainSet(samples(job.data.train, store, job.seed, keep=job.data.in_memory), job.data.max_bad_samples)
    order = TrainOrder(plan, len(store), seed=job.seed, rank=rank, start_step=start_step)
    return _batches(_loader(dataset, order, job.data.num_workers))


def eval_loader(job: Job, plan: BatchPlan, *, rank: int) -> Iterator[EvalBatch]:
    """Micro-batches of the samples rank, rank + world_size, ... of `data.eval`, the same number on every rank.

    All have `micro_batch_size` samples; padding is marked in `valid`, and every sample is valid once over all ranks.
    Raises as `train_loader`; a sample that cannot be decoded is never replaced.
    """
    _check_rank(rank, plan)
    if job.data.eval is None:
        raise DataError("data.eval: the job has no evaluation data")
    store = _open(job.data.eval, job.data.cache_dir)
    dataset = EvalSet(samples(job.data.eval, store, job.seed, keep=False))
    return _batches(_loader(dataset, EvalOrder(plan, len(store), rank=rank), job.data.num_workers))


def check(split: Split, cache_dir: str | None = None) -> None:
    """Raises DataError if a shard is missing or damaged, samples do not have what the transform reads, or those in all
    shards are not `split.samples`.

    Builds the indexes, so that a later start of many ranks finds them.
    """
    _open(split, cache_dir)


def _open(split: Split, cache_dir: str | None) -> SampleStore:
    # one byte more than is read, so that the last one has a target as well
    sequence_bytes = None if split.length is None else split.length + 1
    # A thousand indexes take seconds, and a plan, a training and each evaluation want them.
    shards = tuple(
        (path, path.stat().st_size, path.stat().st_mtime_ns) for path in local_shards(split.shards, cache_dir)
    )
    store = _store(split.shards, cache_dir, sequence_bytes, shards)
    if len(store) != split.samples:
        counts = store.counts()
        usual = max(count for _, count in counts)
        odd = [f"{path}: {count}" for path, count in counts if count != usual]
        detail = f"; shards with other than {usual} samples: {', '.join(odd[:8])}" if odd else f", {usual} in each"
        raise DataError(
            f"shards {split.shards}: {len(store)} samples in {len(counts)} shards, but the job says samples: "
            f"{split.samples}{detail}"
        )
    return store


@functools.lru_cache(maxsize=4)
def _store(pattern: str, cache_dir: str | None, sequence_bytes: int | None, shards: tuple[Any, ...]) -> SampleStore:
    """shards: files, sizes and times, of which a store is no longer that when they change."""
    return SampleStore(pattern, cache_dir, sequence_bytes=sequence_bytes)


def _check_rank(rank: int, plan: BatchPlan) -> None:
    if not 0 <= rank < plan.world_size:
        raise ValueError(f"rank is {rank}, must be 0 to {plan.world_size - 1} (world_size {plan.world_size})")


def _loader(dataset: Dataset, order: TrainOrder | EvalOrder, num_workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=order,  # type: ignore[arg-type]  # any iterable of lists will do
        num_workers=num_workers,
        collate_fn=_as_is,
        # torch would draw a number from the global generator for each iterator, and dropout would depend on resumes
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        # a fork of a process with CUDA, NCCL or gloo threads may deadlock; a fork server dies of the SIGTERM that
        # workers ignore
        multiprocessing_context="spawn" if num_workers else None,
        worker_init_fn=ignore_signals,
    )


def _batches(loader: DataLoader) -> Iterator[Any]:
    with recorded():
        iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        # the last reference: an iterator that the garbage collector finds in the cycle of an exception has lost the
        # queues by which it ends its workers, and waits ten seconds for each
        del iterator


def _as_is(batch: T) -> T:
    return batch
