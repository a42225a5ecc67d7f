"""Which samples a rank takes at a step: pure functions of a few integers, without any state to save.

The order never mentions the number of ranks: a step takes the same global batch on 1, 2 or 4 ranks, and a run may
continue at any step on any number of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dst_train.job import BatchPlan


class Ref(NamedTuple):
    """One position of a micro-batch."""

    epoch: int
    sample: int
    valid: bool = True


def stable_seed(*parts: int | str) -> int:
    """63 bits that depend on the parts only: not on the process, the platform or PYTHONHASHSEED."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def permutation(samples: int, *, seed: int, epoch: int) -> torch.Tensor:
    """The order of an epoch: int64 [samples]."""
    generator = torch.Generator().manual_seed(stable_seed(seed, "order", epoch))
    return torch.randperm(samples, generator=generator)


class TrainOrder:
    """Micro-batches of one rank from `start_step` on, as lists of Ref: a batch sampler.

    Global batch b of an epoch is `permutation[b * B : (b + 1) * B]`; its micro-batch a * world_size + rank is the
    rank's a-th. An incomplete last batch is dropped.
    """

    def __init__(self, plan: BatchPlan, samples: int, *, seed: int, rank: int, start_step: int) -> None:
        self.plan, self.samples, self.seed, self.rank, self.start_step = plan, samples, seed, rank, start_step

    def __iter__(self) -> Iterator[list[Ref]]:
        plan, order, order_epoch = self.plan, torch.empty(0), -1
        for step in range(self.start_step, plan.total_steps):
            epoch, batch = divmod(step, plan.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = permutation(self.samples, seed=self.seed, epoch=epoch), epoch
            for accumulated in range(plan.accumulation):
                micro = accumulated * plan.world_size + self.rank
                start = batch * plan.batch_size + micro * plan.micro_batch_size
                yield [Ref(epoch, i) for i in order[start : start + plan.micro_batch_size].tolist()]


class EvalOrder:
    """Samples rank, rank + world_size, ... in micro-batches of one size; as many batches on every rank.

    Missing positions are filled with sample 0 and are not valid.
    """

    def __init__(self, plan: BatchPlan, samples: int, *, rank: int) -> None:
        self.plan, self.samples, self.rank = plan, samples, rank

    def __len__(self) -> int:
        return -(-self.samples // (self.plan.world_size * self.plan.micro_batch_size))

    def __iter__(self) -> Iterator[list[Ref]]:
        size = self.plan.micro_batch_size
        for batch in range(len(self)):
            indices = (self.rank + self.plan.world_size * (batch * size + i) for i in range(size))
            yield [Ref(0, i) if i < self.samples else Ref(0, 0, valid=False) for i in indices]
