"""Everything a rank holds while it trains: the process group, the model, the DeepSpeed engine and the topology."""

from __future__ import annotations

import datetime
import os
import random
from dataclasses import dataclass

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

import dst_train.engine.params  # noqa: F401  (registers the DeepSpeed editor that Topology.bind looks up)
from dst_train import models
from dst_train.engine.build import build_topology, sparsify_model
from dst_train.engine.config import compile_config
from dst_train.engine.optim import build_optimizer
from dst_train.job import BatchPlan, Job
from dst_train.processes import free_port
from dst_train.sparse import SparsityReport
from dst_train.topology import Topology

YEAR = 365.0 * 24 * 60  # in minutes


@dataclass(frozen=True)
class Session:
    engine: DeepSpeedEngine
    topology: Topology
    report: SparsityReport
    input_dtype: torch.dtype


def init_distributed() -> tuple[int, int]:
    """Join the ranks that the launcher started (or be the only one); returns (rank, world_size)."""
    if not dist.is_initialized():
        if "RANK" not in os.environ:  # python launch/train.py, without a launcher
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(alone, MASTER_PORT=str(free_port()))
        if get_accelerator().device_name() != "cpu":
            # DeepSpeed selects it when it gets the model: collectives before that, such as whether there is a checkpoint, would
            # all be on the first GPU, which NCCL refuses.
            get_accelerator().set_device(_select_gpu(get_accelerator().device_count()))
        else:
            # Used by inference only, and would be compiled for most of a minute inside init_distributed.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
    return dist.get_rank(), dist.get_world_size()


def _select_gpu(count: int) -> int:
    """The number of this rank's GPU among those that it sees.

    Raises:
        RuntimeError: it sees fewer than there are ranks on its node.
    """
    local = int(os.environ["LOCAL_RANK"])
    if count == 1 and local and "CUDA_VISIBLE_DEVICES" in os.environ:
        # Each rank was given one of its own, and DeepSpeed takes this for the GPU's number.
        os.environ["LOCAL_RANK"] = "0"
        return 0
    if local >= count:
        raise RuntimeError(
            f"LOCAL_RANK is {local} and this process sees {count} GPUs (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start at most as many ranks on a node as it has GPUs"
        )
    return local


def extend_collective_timeouts(minutes: float) -> None:
    """Gives every process group more time than the watchdog takes to end a rank that hangs: groups of NCCL have 10 minutes, and end the
    ranks that wait without a word of where. Also for what does not count as hanging, as copying shards."""
    limit = datetime.timedelta(minutes=min(2 * minutes + 60, YEAR))  # more overflows in gloo
    # torch 2.11 has it under another name.
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout
    for group in list(c10d._world.pg_map):
        set_timeout(limit, group)


def shutdown_distributed(*, together: bool = True) -> None:
    """The last thing a process does: left to the interpreter's end, gloo's threads may abort it.

    together: wait for the other ranks, which may have something left to do. Without them groups of NCCL are left as they are: to end
    one may wait for the others to do so.
    """
    if together:
        dist.barrier()
    if together or dist.get_backend() == "gloo":
        dist.destroy_process_group()


def close_session(session: Session) -> None:
    """Frees what a process that goes on to another job must not keep: the engine, and the topology's process group.

    DeepSpeed's hooks would hold the engine for ever, and a group holds threads and sockets. ZeRO 3 keeps its engine all the same.
    """
    session.engine.destroy()
    session.topology.close()


def build_session(job: Job, plan: BatchPlan) -> Session:
    """Model, sparse layers, optimiser, engine and topology of a job. Collective; the same on every rank."""
    model = models.build(job.model, seed=job.seed)
    report = sparsify_model(job, plan, model)
    optimizer = build_optimizer(job, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=compile_config(job, plan))
    topology = build_topology(job, plan, engine.module).bind(engine)
    extend_collective_timeouts(job.monitor.hang_minutes)
    seed_random_numbers(job.seed, dist.get_rank())
    return Session(engine, topology, report, torch.bfloat16 if job.train.precision == "bf16_params" else torch.float32)


def seed_random_numbers(seed: int, rank: int, step: int = 0) -> None:
    """Dropout and the like: a stream of its own for each rank, and for each step at which the number of ranks changes."""
    value = (seed * 1_000_003 + step * 7_368_787 + rank) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
