import hashlib
import random
from functools import partial

import numpy as np
import pytest
import torch

from dst_train.data import eval_loader, train_loader
from dst_train.data.order import permutation, stable_seed
from dst_train.job import BatchPlan


@pytest.fixture
def per_step(numbers):
    """Sample numbers of each global batch, in the order of the micro-batches."""
    return partial(_per_step, numbers)


def _per_step(numbers, job, world_size, start_step=0):
    plan = BatchPlan.of(job, world_size)
    ranks = [train_loader(job, plan, rank=rank, start_step=start_step) for rank in range(world_size)]
    steps = []
    for _ in range(start_step, plan.total_steps):
        steps.append([n for _ in range(plan.accumulation) for rank in ranks for n in numbers(next(rank).inputs)])
    assert all(next(rank, None) is None for rank in ranks)
    return steps


def test_permutation_is_one_and_depends_on_seed_and_epoch():
    orders = [permutation(1000, seed=seed, epoch=epoch).tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert permutation(1000, seed=0, epoch=0).tolist() == orders[0]


def test_stable_seed_is_the_head_of_a_sha256():
    # pinned: a change would change the order of every resumed run
    assert stable_seed(3, "order", 7) == int(hashlib.sha256(b"3/order/7").hexdigest()[:16], 16) // 2


def test_steps_follow_the_permutation_and_drop_the_incomplete_batch(make_job, per_step):
    steps = per_step(make_job(), 1)
    assert len(steps) == 2 * (50 // 16)
    for epoch in (0, 1):
        seen = [n for step in steps[epoch * 3 : epoch * 3 + 3] for n in step]
        assert seen == permutation(50, seed=0, epoch=epoch).tolist()[:48]


def test_any_world_size_sees_the_same_global_batches(make_job, per_step):
    one = per_step(make_job(), 1)
    assert per_step(make_job(), 2) == one
    assert per_step(make_job(), 4) == one
    assert per_step(make_job(seed=1), 1) != one


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_continues_at_any_step(make_job, per_step, world_size):
    job = make_job()
    whole = per_step(job, 1)
    for start in range(len(whole) + 1):
        assert per_step(job, world_size, start) == whole[start:]


def test_labels_belong_to_their_images(make_job, numbers):
    job = make_job()
    for batch in train_loader(job, BatchPlan.of(job, 1), rank=0):
        assert batch.targets.tolist() == [n % 7 for n in numbers(batch.inputs)]
        assert batch.inputs.dtype == torch.float32
        assert batch.inputs.shape == (4, 1, 28, 28)
        assert batch.targets.dtype == torch.int64
        assert batch.replaced == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 16])
def test_eval_counts_every_sample_once(make_job, numbers, world_size, micro_batch_size):
    job = make_job()
    plan = BatchPlan(
        micro_batch_size=micro_batch_size,
        accumulation=1,
        world_size=world_size,
        batch_size=micro_batch_size * world_size,
        steps_per_epoch=1,
        total_steps=1,
        warmup_steps=0,
    )
    ranks = [list(eval_loader(job, plan, rank=rank)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for rank, batches in enumerate(ranks):
        for batch in batches:
            assert batch.inputs.shape[0] == batch.targets.shape[0] == batch.valid.shape[0] == micro_batch_size
            counted = [n for n, valid in zip(numbers(batch.inputs), batch.valid.tolist(), strict=True) if valid]
            assert batch.targets[batch.valid].tolist() == [n % 7 for n in counted]
            assert all(n % world_size == rank for n in counted)
            seen += counted
    assert sorted(seen) == list(range(50))


def test_loading_leaves_the_global_generators_alone(make_job):
    job = make_job()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    plan = BatchPlan.of(job, 1)
    next(train_loader(job, plan, rank=0))
    next(eval_loader(job, plan, rank=0))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(before[2], np.random.get_state(), strict=True))


def test_ranges_are_checked(make_job):
    job = make_job()
    plan = BatchPlan.of(job, 2)
    with pytest.raises(ValueError, match="rank is 2, must be 0 to 1"):
        train_loader(job, plan, rank=2)
    with pytest.raises(ValueError, match="rank is -1"):
        eval_loader(job, plan, rank=-1)
    with pytest.raises(ValueError, match="start_step is 7, must be 0 to 6"):
        train_loader(job, plan, rank=0, start_step=7)
