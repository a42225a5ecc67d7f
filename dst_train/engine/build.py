"""Sparse layers and topology of a job, without DeepSpeed: a plan makes them as well, to refuse what they refuse."""

from __future__ import annotations

from torch import nn

from dst_train.job import BatchPlan, Job
from dst_train.sparse import SparsityReport, sparsify
from dst_train.topology import Topology


def sparsify_model(job: Job, plan: BatchPlan, model: nn.Module) -> SparsityReport:
    """Make the layers sparse that the job says; a report without layers when it says none. ValueError as `sparsify`."""
    if job.sparsity is None:
        parameters = sum(p.numel() for p in model.parameters())
        return SparsityReport((), parameters, parameters)
    return sparsify(
        model,
        job.sparsity.rules,
        budget=job.sparsity.budget,
        seed=job.seed,
        explore=job.topology.explore_factor,
        gate=job.topology.gate,
        accumulation=plan.accumulation,
        rank=job.sparsity.low_rank.rank if job.sparsity.low_rank is not None else 0,
    )


def build_topology(job: Job, plan: BatchPlan, model: nn.Module) -> Topology:
    """The topology of a job over a sparsified model, not yet bound. ValueError as `Topology`."""
    return Topology(
        model,
        method=job.topology.method if job.sparsity is not None else "static",
        total_steps=plan.total_steps,
        every=job.topology.update.every,
        until=job.topology.update.until,
        drop_fraction=job.topology.drop_fraction,
        grow_signal=job.topology.grow_signal,
        gradient_weight=job.topology.gradient_weight,
        cold_start=job.topology.cold_start,
        gamma_sal=job.topology.gamma_sal,
        channel_sparsity=job.topology.channel_sparsity,
        temperature=(job.topology.temperature.start, job.topology.temperature.end),
        seed=job.seed,
        accumulation=plan.accumulation,
    )
