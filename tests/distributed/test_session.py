"""A closed session leaves nothing behind, so that a process can take one job after the other."""

from __future__ import annotations

import gc
import os
import weakref

import pytest

from dst_train.job import BatchPlan
from tests.distributed.ranks import run_ranks
from tests.distributed.test_config import _job


def _sessions() -> list[tuple[int, bool, int, int]]:
    """For sessions one after the other: ZeRO stage, whether the engine lives on, and the process's threads and files."""
    from dst_train.engine.session import build_session, close_session, init_distributed

    _, world_size = init_distributed()
    left = []
    for stage in (0, 0, 1, 1, 2, 2):
        job = _job("fp32", stage)
        session = build_session(job, BatchPlan.of(job, world_size))
        engine = weakref.ref(session.engine)
        close_session(session)
        del session
        gc.collect()
        left.append((stage, engine() is not None, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
    return left


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts what Linux shows of a process")
def test_a_closed_session_leaves_nothing_behind() -> None:
    (left,) = run_ranks(1, _sessions)
    # The first session of all starts threads that stay, such as autograd's.
    assert {(alive, *counts) for _, alive, *counts in left[1:]} == {(False, *left[1][2:])}, left


def _patience() -> list[float]:
    """Seconds that collectives of each process group may take."""
    import torch
    import torch.distributed.distributed_c10d as c10d

    from dst_train.engine.session import build_session, close_session, init_distributed

    _, world_size = init_distributed()
    job = _job("fp32", 1)
    session = build_session(job, BatchPlan.of(job, world_size))
    groups = [group._get_backend(torch.device("cpu")) for group in c10d._world.pg_map]
    found = [backend.options._timeout.total_seconds() for backend in groups]
    close_session(session)
    return found


def test_no_group_gives_up_before_the_watchdog_has_spoken() -> None:
    (found,) = run_ranks(1, _patience)
    assert len(found) >= 3  # all ranks, DeepSpeed's, the topology's
    assert set(found) == {60.0 * (2 * 30 + 60)}
